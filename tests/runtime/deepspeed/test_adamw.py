"""AdamW: the updates against the formula, which implementation serves, and the number of updates in its state."""

import sys
from types import ModuleType

import pytest
import torch
from deepspeed import git_version_info

from megavl.runtime.deepspeed import adamw
from megavl.runtime.deepspeed.adamw import choose_adamw, first_step, set_step
from tests.runtime.cases import build, run_config, step_batch

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
DECAYS = (0.1, 0.0)
SHAPES = ((37, 16), (5,))
STEPS = 20
CUDA = torch.device("cuda")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


# -- updates


def weights(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    """Of one step; their magnitudes differ by six decades between steps."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 7 - 3) for shape in SHAPES]


def groups_of(parameters: list[torch.Tensor]) -> list[dict]:
    return [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, DECAYS, strict=True)]


def trained(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: range) -> list[torch.Tensor]:
    """fp64 values on the CPU after `steps`."""
    for step in steps:
        for parameter, grad in zip(parameters, gradients(step), strict=True):
            parameter.grad = grad.to(parameter.device)
        optimizer.step()
    return [parameter.detach().double().cpu() for parameter in parameters]


def by_the_formula(steps: int) -> list[torch.Tensor]:
    """AdamW in fp64: arXiv 1711.05101, algorithm 2, with the decay scaled by the learning rate as in torch."""
    beta1, beta2 = HYPER["betas"]
    results = []
    for index, (w, decay) in enumerate(zip(weights(dtype=torch.float64), DECAYS, strict=True)):
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for step in range(steps):
            g = gradients(step)[index].double()
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
            w = w - HYPER["lr"] * (m_hat / (v_hat.sqrt() + HYPER["eps"]) + decay * w)
        results.append(w)
    return results


def worst(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest absolute difference; the weights are about 1."""
    return max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_updates_follow_the_formula(device):
    parameters = weights(device)
    optimizer = choose_adamw(torch.device(device), zero=1).build(groups_of(parameters), **HYPER)
    # Measured on a CPU: 1.1e-6 after 20 steps, which moved the weights by up to 0.035.
    assert worst(trained(optimizer, parameters, range(STEPS)), by_the_formula(STEPS)) < 5e-6


@pytest.mark.parametrize("device", DEVICES)
def test_updates_equal_those_of_torch_without_fusion(device):
    fused, plain = weights(device), weights(device)
    ours = trained(choose_adamw(torch.device(device), zero=1).build(groups_of(fused), **HYPER), fused, range(STEPS))
    expected = trained(torch.optim.AdamW(groups_of(plain), foreach=False, **HYPER), plain, range(STEPS))
    assert worst(ours, expected) < 1e-6  # measured on a CPU: 1.5e-8


def test_a_weight_without_its_decay_would_be_noticed():
    """Negative control for the tolerance of both tests."""
    parameters = weights()
    groups = [{"params": parameters, "weight_decay": 0.0}]
    ours = trained(choose_adamw(torch.device("cpu"), zero=1).build(groups, **HYPER), parameters, range(STEPS))
    assert worst(ours, by_the_formula(STEPS)) > 1e-3


# -- choice


class StandIn:
    """Records what a fused Adam was built with."""

    def __init__(self, groups: list[dict], **hyper):
        self.groups, self.hyper = groups, hyper


@pytest.fixture
def bare(monkeypatch):
    """An installation without apex, whose DeepSpeed was built without its fused Adam and cannot compile it."""
    monkeypatch.setitem(sys.modules, "amp_C", None)
    monkeypatch.setattr(git_version_info, "installed_ops", {"fused_adam": False})
    monkeypatch.setattr(git_version_info, "accelerator_name", "cuda")
    monkeypatch.setattr(adamw, "FusedAdam", StandIn)
    monkeypatch.setattr(adamw, "FusedAdamBuilder", type("Builder", (), {"load": refuse_to_compile}))


def refuse_to_compile(self):
    raise AssertionError("the extension would be compiled at run time")


def install_apex(monkeypatch) -> None:
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = StandIn
    for name, module in {"apex": apex, "apex.optimizers": optimizers, "amp_C": ModuleType("amp_C")}.items():
        monkeypatch.setitem(sys.modules, name, module)


def install_deepspeeds(monkeypatch, load) -> None:
    monkeypatch.setattr(git_version_info, "installed_ops", {"fused_adam": True})
    monkeypatch.setattr(adamw, "FusedAdamBuilder", type("Builder", (), {"load": load}))


def test_torchs_serves_a_cpu_whatever_is_installed(bare, monkeypatch):
    install_apex(monkeypatch)
    install_deepspeeds(monkeypatch, lambda self: None)
    chosen = choose_adamw(torch.device("cpu"), zero=1)
    assert chosen.line == "optimizer: torch AdamW, fused (apex's and DeepSpeed's need CUDA, the device is cpu)"
    optimizer = chosen.build(groups_of(weights()), **HYPER)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]


def test_torchs_serves_a_gpu_where_nothing_is_built(bare):
    chosen = choose_adamw(CUDA, zero=1)
    assert chosen.line.startswith("optimizer: torch AdamW, fused (apex does not import: ")
    assert chosen.line.endswith("; DeepSpeed was installed without its fused Adam)")


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_apexs_serves_first(bare, monkeypatch, zero):
    install_apex(monkeypatch)
    install_deepspeeds(monkeypatch, lambda self: None)
    chosen = choose_adamw(CUDA, zero)
    assert chosen.line == "optimizer: apex FusedAdam"
    assert chosen.build([{}], **HYPER).hyper == HYPER | {"adam_w_mode": True}


def test_apex_without_its_extension_does_not_serve(bare, monkeypatch):
    install_apex(monkeypatch)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert "torch AdamW" in choose_adamw(CUDA, zero=1).line


def test_apexs_does_not_serve_zero_3(bare, monkeypatch):
    install_apex(monkeypatch)
    assert "torch AdamW, fused (apex counts updates per group" in choose_adamw(CUDA, zero=3).line


def test_deepspeeds_serves_where_it_is_built(bare, monkeypatch):
    loads = []
    install_deepspeeds(monkeypatch, lambda self: loads.append(1))
    chosen = choose_adamw(CUDA, zero=3)
    assert chosen.line.startswith("optimizer: DeepSpeed FusedAdam, built at install time (apex ")
    assert loads == [1]
    assert chosen.build([{}], **HYPER).hyper == HYPER | {"adam_w_mode": True}


def test_deepspeeds_for_another_accelerator_does_not_serve(bare, monkeypatch):
    monkeypatch.setattr(git_version_info, "installed_ops", {"fused_adam": True})
    monkeypatch.setattr(git_version_info, "accelerator_name", "cpu")
    assert "torch AdamW" in choose_adamw(CUDA, zero=1).line


def test_deepspeeds_for_another_torch_does_not_serve(bare, monkeypatch):
    def load(self):
        raise RuntimeError("PyTorch version mismatch!\nrecompile")

    install_deepspeeds(monkeypatch, load)
    line = choose_adamw(CUDA, zero=1).line
    assert line.startswith("optimizer: torch AdamW")
    assert line.endswith("; DeepSpeed's fused Adam does not load: PyTorch version mismatch!)")


# -- state


@pytest.mark.parametrize("device", DEVICES)
def test_a_restored_number_of_updates_goes_on_bit_for_bit(device):
    def build(parameters):
        return torch.optim.AdamW(groups_of(parameters), fused=True, **HYPER)

    uninterrupted = weights(device)
    first = build(uninterrupted)
    trained(first, uninterrupted, range(7))
    resumed = [parameter.detach().clone() for parameter in uninterrupted]
    second = build(resumed)
    for before, after in zip(uninterrupted, resumed, strict=True):
        moments = {name: first.state[before][name].clone() for name in ("exp_avg", "exp_avg_sq")}
        second.state[after] = {"step": first_step(second, after), **moments}
        assert second.state[after]["step"].dtype == torch.float32
        assert second.state[after]["step"].device == after.device
    set_step(second, 7)
    expected = trained(first, uninterrupted, range(7, 12))
    assert worst(trained(second, resumed, range(7, 12)), expected) == 0
    assert all("step" not in group for group in second.param_groups)


def test_a_fused_adam_of_apexs_signature_counts_in_its_groups():
    """Its state keeps an integer, which DeepSpeed's reads."""
    parameter = torch.zeros(3)
    adam = torch.optim.SGD([parameter], lr=1.0)  # any optimizer but torch's AdamW
    adam.state[parameter] = {"step": first_step(adam, parameter)}
    assert adam.state[parameter]["step"] == 0
    set_step(adam, 9)
    assert adam.state[parameter]["step"] == 9 and adam.param_groups[0]["step"] == 9


def two_steps(configs) -> list[dict]:
    """What the optimizer of each run keeps after two steps."""
    found = []
    for config in configs:
        replica = build(config)
        for step in range(2):
            replica.step(step_batch(step, config, replica.mesh), config.optim.lr)
        adam = replica.engine.basic_optimizer
        steps = [state["step"] for state in adam.state.values()]
        found.append(
            {
                "type": type(adam).__name__,
                "fused": [group["fused"] for group in adam.param_groups],
                "steps": {step.item() for step in steps},
                "dtypes": {step.dtype for step in steps},
            }
        )
    return found


def test_deepspeed_takes_the_fused_optimizer_at_every_stage(pool):
    runs = [(zero, "fp32") for zero in range(4)] + [(zero, "bf16") for zero in range(1, 4)]
    configs = [run_config(2, parallel={"zero": zero}, train={"precision": precision}) for zero, precision in runs]
    for results in pool.run(2, two_steps, configs):
        for found in results:
            assert found["type"] == "AdamW" and all(found["fused"])
            assert found["steps"] == {2.0} and found["dtypes"] == {torch.float32}
