"""The private parts of DeepSpeed that `trainer.engines.deepspeed_internals` uses exist in the installed version.

When this fails after an upgrade of DeepSpeed, look each name up in the new version, correct the module, run the engine
matrix (`make test-full`), and only then change the version here and in setup.py.
"""

import inspect

import deepspeed
import pytest
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

TESTED_VERSION = "0.19."
FIELDS = {  # set in __init__, so that they are no attributes of the class
    DeepSpeedZeroOptimizer: ("single_partition_of_fp32_groups", "cpu_offload", "clip_grad"),
    DeepSpeedZeroOptimizer_Stage3: (
        *("fp32_partitioned_groups_flat", "grad_partitions_flat_buffer", "grad_position", "persistent_parameters"),
        *("fp16_groups", "offload_optimizer", "clip_grad"),
    ),
}
METHODS = {
    DeepSpeedZeroOptimizer: ("scaled_global_norm", "update_lp_params", "clear_backward_seen_flag"),
    DeepSpeedZeroOptimizer_Stage3: (
        *("_get_norm_groups", "_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters"),
        *("get_param_id", "clear_backward_seen_flag"),
    ),
}


def test_the_installed_version_is_the_tested_one():
    assert deepspeed.__version__.startswith(TESTED_VERSION)


@pytest.mark.parametrize("optimizer", METHODS)
def test_the_methods_and_fields_exist(optimizer):
    assert [name for name in METHODS[optimizer] if not hasattr(optimizer, name)] == []
    source = inspect.getsource(optimizer)
    assert [name for name in FIELDS[optimizer] if f"self.{name}" not in source] == []


def test_step_takes_its_norm_from_the_replaced_methods():
    """ZeRO's step calls exactly these, so that replacing them decides about clipping and skipping."""
    assert "self.scaled_global_norm()" in inspect.getsource(inspect.unwrap(DeepSpeedZeroOptimizer.step))
    assert "self._get_norm_groups()" in inspect.getsource(inspect.getmodule(DeepSpeedZeroOptimizer_Stage3))
    assert callable(getattr(__import__("deepspeed.comm.torch", fromlist=["build_shm_op"]), "build_shm_op", None))
