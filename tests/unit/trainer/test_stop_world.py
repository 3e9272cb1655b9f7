"""What is left of the process groups when the world has stopped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main

# A gloo worker sleeps after it has announced that a collective is done, so that it frees the tensors last. When it then
# asks for the GIL, it does not run until the interpreter finalizes. A loaded machine does so about once in 14 runs.
SLOW_WORKER = r"""
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
static bool is_slow() {
  char name[16];
  return getenv("SLOW") && !pthread_getname_np(pthread_self(), name, sizeof name) && strstr(name, "gloo_runloop");
}
void std::condition_variable::notify_all() noexcept {
  static auto real = (void (*)(void*))dlsym(RTLD_NEXT, "_ZNSt18condition_variable10notify_allEv");
  real(this);
  if (is_slow()) usleep(200000);
}
extern "C" void PyEval_AcquireThread(void* state) {
  static auto real = (void (*)(void*))dlsym(RTLD_NEXT, "PyEval_AcquireThread");
  static auto initialized = (int (*)())dlsym(RTLD_DEFAULT, "Py_IsInitialized");
  if (is_slow())
    for (int i = 0; i < 3000 && initialized(); i++) usleep(1000);
  real(state);
}
"""
PROGRAM = """
import os, time
import torch
import torch.distributed as dist
from torch import nn
from trainer.config import EngineConfig
from trainer.engines import build_engine
from trainer.parallel import start_world, stop_world

def gloo_threads():
    comms = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            comms.append(file.read())
    return sum("gloo" in comm for comm in comms)

world = start_world("cpu")
make_optimizer = lambda parameters, apex=True: torch.optim.AdamW(parameters)
module = nn.Sequential(nn.Linear(4, 4))
engine = build_engine(EngineConfig(kind="fsdp2"), world, module, make_optimizer, micro_batch_size=1, micro_batches=1)
engine.backward(engine(torch.ones(1, 4)).mean(), last=True)
engine.step(0.1)
assert gloo_threads()
os.environ["SLOW"] = "1"
dist.all_reduce(torch.ones(2))
time.sleep(0.8)
stop_world()
print(gloo_threads(), "gloo threads are left")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and preloads a library")
def test_process_ends_with_0_however_slow_gloos_threads_are(launch, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is required to run the tests"
    (tmp_path / "slow.cpp").write_text(SLOW_WORKER)
    library = tmp_path / "slow.so"
    subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "slow.cpp", "-o", library, "-ldl"], check=True)
    program = launch.start(sys.executable, "-c", PROGRAM, LD_PRELOAD=str(library))
    assert launch.finish(program).succeeded().out == "0 gloo threads are left\n"


RUN = ["trainer.device=cpu", "trainer.max_steps=1", "trainer.checkpoint_every_steps=1", "data.val=null"]
ENGINES = {
    "ddp": ["engine.kind=ddp", "codebook_parallel=2"],
    "zero1": ["engine.kind=deepspeed", "engine.config=zero1"],
    "zero3": ["engine.kind=deepspeed", "engine.config=zero3", "codebook_parallel=2"],
    "fsdp2": ["engine.kind=fsdp2", "codebook_parallel=2"],
}


def gloo_threads_after(arguments: list[str]) -> tuple[int, int]:
    """(exit status, gloo threads that are left) of a training run in this process."""
    status = main(arguments)
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return status, sum("gloo" in name for name in names)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero1", marks=pytest.mark.full), "zero3", "fsdp2"])
def test_a_finished_run_leaves_no_gloo_thread(ranks, tmp_path, engine):
    """A thread that is left may abort the interpreter at its end."""
    arguments = ["debug", f"run={tmp_path / 'run'}", *RUN, *ENGINES[engine]]
    assert ranks.call(2, gloo_threads_after, arguments, join=False) == [(0, 0)] * 2
