"""The operators of a run: chosen once, by a trial on the device, and the same on every rank."""

from megavl.config.run import RunConfig
from megavl.model.cases import cases_of
from megavl.ops.dispatch import Ops, choose
from megavl.ops.trial import Result, Results, Trial, machine
from megavl.parallel.agree import gather, on_every_rank
from megavl.parallel.groups import Mesh
from megavl.runtime.env import Env


def choose_ops(config: RunConfig, mesh: Mesh, env: Env) -> Ops:
    """The operators that `config.ops` asks for, or those that a trial on this device finds fastest. Collective.

    On a CPU nothing is tried. One process of each node measures, and keeps the results for the next run.

    Raises:
        RunError: an implementation that is asked for does not serve the device of some rank.
    """
    # Before the trial, which is collective.
    ops = on_every_rank(lambda: choose(env.device, config.ops, compiles=config.train.compile), mesh.control)
    if env.device.type != "cuda":
        return ops

    def share(mine: Results | None) -> Results:
        return agreed([results for results in gather(mine, mesh.control) if results is not None])

    trial = Trial(
        cases_of(config),
        env.device,
        machine(env.device),
        env.cache_folder / "operators",
        measures=env.local_rank == 0,
        share=share,
    )
    return choose(env.device, config.ops, trial, config.train.compile)


def agreed(of_nodes: list[Results]) -> Results:
    """Merge the results of all nodes, so that every rank makes the same choice: replicated parameters would drift apart
    if their ranks computed gradients with different kernels.

    A candidate serves if it passed on every node; its time is that of the slowest.
    """
    return {op: [_slowest(same) for same in _by_name([results[op] for results in of_nodes])] for op in of_nodes[0]}


def _by_name(of_nodes: list[list[Result]]) -> list[list[Result]]:
    """Results of the candidates that every node has, in the order of the first node."""
    names = [{result.name: result for result in results} for results in of_nodes]
    return [[held[name] for held in names] for name in names[0] if all(name in held for held in names)]


def _slowest(same: list[Result]) -> Result:
    fault = next((result.fault for result in same if result.fault is not None), None)
    times = [result.seconds for result in same]
    return Result(same[0].name, None if None in times else max(times), fault)
