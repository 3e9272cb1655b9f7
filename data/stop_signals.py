"""The signals that ask a job to stop. (A module without other imports: a rank needs it before it imports PyTorch.)"""

import signal

# By which terminals, schedulers and launchers end jobs or warn them that they will (SLURM, PBS and Kubernetes TERM, LSF
# INT, TERM and USR2, Grid Engine USR1, USR2 and XCPU, terminals INT, QUIT and HUP; SLURM and others let users choose).
STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGPWR),
)
