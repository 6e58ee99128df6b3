"""Models spread over processes: FSDP and DeepSpeed's ZeRO, on CPUs, equal DDP and resume exactly."""

import importlib.util
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel, _optim_utils, fully_sharded_data_parallel
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle
from torch.distributed.fsdp._flat_param import FlatParamHandle

from san_hf.devices import warn_of_threads
from san_hf.modeling import SANForSemanticSegmentation
from san_hf.training.config import ConfigError, TrainingConfig
from san_hf.training.loop import train
from san_hf.training.processes import check_launch, check_shared
from san_hf.training.sharding import check_engine
from tests.forks import Run
from tests.tiny import tiny_config
from tests.training.training_runs import configure, read_log, weights, write_root


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
# What `accelerate launch` sets; the tests with DeepSpeed need it installed.
ENGINES = {
    "fsdp2": {**FSDP, "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    # As accelerate launch has it by default.
    "fsdp2-ram-efficient": {
        **FSDP,
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_SYNC_MODULE_STATES": "true",
    },
    # As accelerate launch has it by default, FSDP_USE_ORIG_PARAMS=false included.
    "fsdp1": {**FSDP, "FSDP_VERSION": "1", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    **{f"zero{stage}": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)},
}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
PARAMETERS = [
    pytest.param(name, marks=[pytest.mark.slow, *([needs_deepspeed] if name.startswith("zero") else [])])
    for name in ENGINES
]


def pretend_accelerators() -> None:
    """Accelerate shards only where it has found accelerators: it is told so. All else is its own code."""
    warnings.simplefilter("ignore")  # the engines' own deprecations are Accelerate's to mend
    os.environ.pop("ACCELERATE_USE_CPU")
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    pretend_cpus_are_devices_of_fsdp1()


def pretend_cpus_are_devices_of_fsdp1() -> None:
    """FSDP1 asks for an accelerator, and takes what it has copied "to the CPU" for copies: here they would be views."""
    wrap, unflatten = FullyShardedDataParallel.__init__, _optim_utils._unflatten_orig_param_states
    FullyShardedDataParallel.__init__ = lambda self, *args, device_id, **options: wrap(self, *args, **options)
    _optim_utils._unflatten_orig_param_states = lambda *args: unflatten(*args[:-1], False)
    FlatParamHandle.to_cpu = lambda self: nullcontext()

    def use_cpu(state, *_):
        state._device_handle = _FSDPDeviceHandle(torch.device("cpu"))
        return state

    fully_sharded_data_parallel._init_device_handle = use_cpu


def train_with(engine: str | None, config: TrainingConfig, resume: bool = False) -> Path | None:
    if engine is not None:
        os.environ.update(ENGINES[engine])
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(config.training.gradient_accumulation)
        pretend_accelerators()
    return train(config, resume)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_root(tmp_path_factory.mktemp("runs"), training=11, validation=4)


SETTINGS = [
    "training.steps=4",
    "training.gradient_accumulation=2",
    "checkpoints.every=2",
    "model.freeze_clip=false",
    "model.freeze_text=false",
    "optimizer.max_grad_norm=0.5",
]


@pytest.fixture(scope="module")
def reference(root) -> Path:
    (final, _) = Run(train_with, None, configure(root, root / "ddp", *SETTINGS), processes=2).outcomes()
    assert final == root / "ddp" / "final", final
    return root / "ddp"


@pytest.mark.parametrize("engine", PARAMETERS)
def test_engine_equals_ddp_and_resumes(root, reference, engine):
    """
    A 0-dimensional parameter, which can't be spread; a unit within another's; an empty model in all processes but the
    first; clipping that DeepSpeed never hears of; zero.Init around loading; states that don't come back on resuming.
    """
    output = root / engine
    config = configure(root, output, *SETTINGS)
    outcomes = Run(train_with, engine, config, processes=2).outcomes(300)
    assert outcomes == [output / "final"] * 2
    for got, expected in zip(read_log(output), read_log(reference), strict=True):
        assert got.pop("validation", None) == expected.pop("validation", None)
        assert got == pytest.approx(expected, rel=1e-5)
    found, wanted = (load_file(folder / "final" / "model.safetensors") for folder in (output, reference))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Attention doesn't depend on the keys' bias: its gradient is rounding, which AdamW magnifies.
        atol = 1e-2 if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)  # shapes and dtypes, too

    expected, log = weights(output), read_log(output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    assert Run(train_with, engine, config, True, processes=2).outcomes(300) == [output / "final"] * 2
    assert weights(output) == expected
    assert read_log(output) == log


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_configuration_of_its_own(root):
    """A clipping that DeepSpeed's own configuration sets otherwise, and one of the two silently wins."""
    ENGINES["clipped"] = ENGINES["zero2"] | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    config = configure(root, root / "clipped", "training.steps=1")
    for error, message in Run(train_with, "clipped", config, processes=2).outcomes():
        assert error == "ConfigError"
        assert "gradient_clipping 1.0" in message and "optimizer.max_grad_norm" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_VERSION": "1"}, "SHARDED_STATE_DICT"),
    ],
)
def test_fsdp_that_is_refused(root, setting, message):
    """FSDP units that cut modules whose weights are read from outside; FSDP1 that forgets the optimiser's state."""
    ENGINES["refused"] = ENGINES["fsdp2"] | setting
    config = configure(root, root / "refused", "training.steps=1")
    for error, said in Run(train_with, "refused", config, processes=2).outcomes():
        assert error == "ConfigError" and message in said


def test_spread_temperature_is_saved_without_dimension(tmp_path):
    """A `logit_scale` that keeps the dimension which engines need, in a checkpoint that nothing else loads then."""
    model = SANForSemanticSegmentation(tiny_config())
    expected = model.logit_scale.detach().clone()
    model.logit_scale = torch.nn.Parameter(expected.reshape(1))
    for name, options in {"own": {}, "given": {"state_dict": model.state_dict()}}.items():
        model.save_pretrained(tmp_path / name, **options)
        saved = load_file(tmp_path / name / "model.safetensors")
        assert saved["logit_scale"].shape == () and saved["logit_scale"] == expected
        assert SANForSemanticSegmentation.from_pretrained(tmp_path / name).logit_scale.shape == ()


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_engine_that_is_not_in_force(monkeypatch, variable, name):
    """FSDP or DeepSpeed that was asked for where Accelerate quietly uses neither."""
    accelerator = Accelerator(cpu=True)
    check_engine(accelerator)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=f"{name} was asked for.*device cpu"):
        check_engine(accelerator)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "starts a single one.*torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "2 processes were started"),
        ({"WORLD_SIZE": "3"}, "3 processes were started"),
    ],
)
def test_processes_that_do_not_know_each_other(monkeypatch, tmp_path, environment, message):
    """Processes of a launcher that each train for themselves, into the same folder."""
    config, accelerator = configure(tmp_path, tmp_path / "out"), Accelerator(cpu=True)
    check_launch(accelerator, config)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        check_launch(accelerator, config)


def test_half_precision_that_is_not_in_force(tmp_path):
    """fp16 on a CPU, where Accelerate quietly trains in float32."""
    config = configure(tmp_path, tmp_path / "out", "training.mixed_precision=fp16")
    (outcome,) = Run(lambda: check_launch(Accelerator(cpu=True, mixed_precision="fp16"), config)).outcomes()
    assert outcome[0] == "ConfigError" and "set training.mixed_precision=bf16" in outcome[1]


@pytest.mark.parametrize(("processes", "threads", "hint"), [(2, 2, True), (2, 1, False), (1, 8, False)])
def test_more_threads_than_cores(monkeypatch, processes, threads, hint):
    """Processes on CPUs that wait for each other's threads, 20 times as long, and nothing says why."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    said = warn_of_threads(torch.device("cpu"), cores=2)
    assert ("OMP_NUM_THREADS=1" in said and "2 cores" in said) if hint else said == ""
    assert warn_of_threads(torch.device("cuda"), cores=2) == ""


def share(folders: list[Path]) -> None:
    import san_hf.training.processes as processes

    processes.SECONDS_TO_BE_SEEN = 0.2
    accelerator = Accelerator()
    # A machine without a shared file system has another folder of the same name.
    if accelerator.is_main_process or folders[0] == folders[1]:
        check_shared(accelerator, folders[0])
    else:
        exists = Path.is_dir
        Path.is_dir = lambda self: exists(folders[1] / self.name)  # type: ignore[method-assign]
        check_shared(accelerator, folders[0])


def test_output_that_is_not_shared(tmp_path):
    """Machines whose output folders are different ones: the first resume ends with an IndexError, a day later."""
    (tmp_path / "there").mkdir()
    assert Run(share, [tmp_path, tmp_path], processes=2).outcomes() == [None, None]
    before = sorted(tmp_path.iterdir())
    for error, message in Run(share, [tmp_path, tmp_path / "there"], processes=2).outcomes():
        assert error == "ConfigError" and f"'{tmp_path}' is not shared" in message and "1 of 2" in message
    assert sorted(tmp_path.iterdir()) == before
