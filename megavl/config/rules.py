"""What must hold between the sections of a run, checked before any process group or device is touched.

Each rule is a small function that returns its problems: what, the values, the consequence, the remedy.
"""

from megavl.config.data_rules import loader_problems, nearest_multiples, sampler_problems
from megavl.config.error import ConfigError
from megavl.config.parameters import parameters
from megavl.config.run import RunConfig
from megavl.config.stages import split_layers, too_many_stages


def check(config: RunConfig, world: int) -> None:
    """Raise ConfigError with everything that keeps `config` from running on `world` ranks."""
    problems = [problem for rule in _RUN_RULES for problem in rule(config)]
    model_ranks = config.parallel.model
    if world % model_ranks:
        problems.insert(
            0,
            f"{world} ranks are not divisible by parallel.tensor * parallel.pipeline = {config.parallel.tensor} * "
            f"{config.parallel.pipeline} = {model_ranks}: start {_nearest_worlds(config, world)} ranks, or cut "
            "the model otherwise",
        )
    else:
        problems += loader_problems(config.train, world // model_ranks) + _expert_ranks(config, world // model_ranks)
    if problems:
        raise ConfigError(f"this run cannot start on {world} ranks", problems)


def _nearest_worlds(config: RunConfig, world: int) -> str:
    """The nearest worlds below and above whose data-parallel ranks also divide the batch and have all experts; where
    there is none, the nearest that the model divides."""
    parallel, train = config.parallel, config.train
    dp, most = world // parallel.model, train.global_batch // train.micro_batch

    def divides(ranks: int) -> bool:
        return ranks % parallel.expert == 0 and train.global_batch % (ranks * train.micro_batch) == 0

    below = next((ranks for ranks in range(min(dp, most), 0, -1) if divides(ranks)), None)
    above = next((ranks for ranks in range(dp + 1, most + 1) if divides(ranks)), None)
    found = [str(ranks * parallel.model) for ranks in (below, above) if ranks is not None]
    return " or ".join(found) or nearest_multiples(world, parallel.model)


def _tensor(config: RunConfig) -> list[str]:
    parallel, decoder = config.parallel, config.model.decoder
    cut = {"heads": decoder.heads, "mlp_width": decoder.mlp_width, "vocab_size": decoder.vocab_size}
    if decoder.mla is None:
        cut["kv_heads"] = decoder.kv_heads
    if decoder.moe is not None:
        cut["moe.shared * width"] = decoder.moe.shared_width
        if parallel.expert_width == "cut":
            cut["moe.width"] = decoder.moe.width
    return [
        f"model.decoder.{field} = {size} is not divisible by parallel.tensor = {parallel.tensor}, over which it is "
        f"cut: choose a divisor of {size}"
        for field, size in cut.items()
        if size % parallel.tensor
    ]


def _sequence(config: RunConfig) -> list[str]:
    parallel, tokens = config.parallel, config.train.micro_batch * config.data.seq_len
    if not parallel.sequence or tokens % parallel.tensor == 0:
        return []
    return [
        f"parallel.sequence: the tokens of a micro-batch, train.micro_batch * seq_len = {config.train.micro_batch} "
        f"* {config.data.seq_len} = {tokens}, are not divisible by parallel.tensor = {parallel.tensor}; change "
        "data.seq_len, or set parallel.sequence=false"
    ]


def _whole_experts(config: RunConfig) -> list[str]:
    parallel, tokens = config.parallel, config.train.micro_batch * config.data.seq_len
    whole = config.model.decoder.moe is not None and parallel.expert_width == "whole"
    # Under sequence parallelism the tokens must divide anyway.
    if not whole or parallel.sequence or tokens % parallel.tensor == 0:
        return []
    return [
        "parallel.expert_width = whole: the tensor ranks share the tokens of a micro-batch, train.micro_batch * "
        f"seq_len = {config.train.micro_batch} * {config.data.seq_len} = {tokens}, which are not divisible by "
        f"parallel.tensor = {parallel.tensor}; change data.seq_len, or set parallel.expert_width=cut"
    ]


def _experts(config: RunConfig) -> list[str]:
    parallel, moe = config.parallel, config.model.decoder.moe
    if parallel.expert == 1:
        return []
    if moe is None:
        return [
            f"parallel.expert = {parallel.expert}, but {config.model.name} has no routed experts to spread over ranks: "
            "set parallel.expert=1"
        ]
    problems = []
    if moe.experts % parallel.expert:
        problems.append(
            f"model.decoder.moe.experts = {moe.experts} is not divisible by parallel.expert = {parallel.expert}, over "
            f"which the experts are spread: choose a divisor of {moe.experts}"
        )
    if parallel.zero == 3:
        problems.append(
            f"parallel.zero = 3 with parallel.expert = {parallel.expert}: DeepSpeed's ZeRO-3 would partition every "
            "expert over all data-parallel ranks, of which only some hold it; use parallel.zero=1 or 2, or "
            "parallel.expert=1"
        )
    return problems


def _balance(config: RunConfig) -> list[str]:
    balance, moe = config.balance, config.model.decoder.moe
    if moe is None:
        return [
            f"balance.{field} = {value:g}, but {config.model.name} has no routed experts to balance: set "
            f"balance.{field}=0"
            for field, value in balance
            if value > 0
        ]
    if balance.bias_step > 0 and moe.router != "sigmoid":
        return [
            f"balance.bias_step = {balance.bias_step:g}, but the router of {config.model.name} is {moe.router} and has "
            "no bias to move: set balance.bias_step=0 and balance by balance.auxiliary_weight, or choose "
            "model.decoder.moe.router=sigmoid"
        ]
    return []


def _stages(config: RunConfig) -> list[str]:
    if config.parallel.stages == "auto":
        problem = too_many_stages(config.model.layers, config.parallel)
        return [problem] if problem else []
    try:
        split_layers(config.model.layers, config.parallel)
    except ValueError as error:
        return [str(error)]
    return []


def _schedule(config: RunConfig) -> list[str]:
    parallel = config.parallel
    if parallel.schedule == "1f1b" and parallel.virtual_stages > 1:
        return [
            f"parallel.schedule = 1f1b runs one stage on each pipeline rank, but parallel.virtual_stages = "
            f"{parallel.virtual_stages}: set parallel.schedule=interleaved, or parallel.virtual_stages=1"
        ]
    if parallel.schedule == "interleaved" and (parallel.virtual_stages == 1 or parallel.pipeline == 1):
        return [
            f"parallel.schedule = interleaved with parallel.virtual_stages = {parallel.virtual_stages} and "
            f"parallel.pipeline = {parallel.pipeline}: there is nothing to interleave; set parallel.virtual_stages and "
            "parallel.pipeline above 1, or parallel.schedule=1f1b"
        ]
    if parallel.schedule == "dualpipev" and (parallel.virtual_stages != 2 or parallel.pipeline == 1):
        return [
            f"parallel.schedule = dualpipev with parallel.virtual_stages = {parallel.virtual_stages} and "
            f"parallel.pipeline = {parallel.pipeline}: each pipeline rank runs two stages, number r from the start and "
            "number r from the end; set parallel.virtual_stages=2 and parallel.pipeline above 1, or "
            "parallel.schedule=1f1b"
        ]
    return []


def _zero(config: RunConfig) -> list[str]:
    parallel = config.parallel
    if parallel.zero >= 2 and parallel.pipeline > 1:
        return [
            f"parallel.zero = {parallel.zero} with parallel.pipeline = {parallel.pipeline}: ZeRO-2 and 3 partition "
            "gradients in the hooks of each backward pass, which a pipeline interleaves with other micro-batches; use "
            "parallel.zero=1, or parallel.pipeline=1"
        ]
    if parallel.zero == 0 and config.train.precision == "bf16":
        return [
            "parallel.zero = 0 with train.precision = bf16: DeepSpeed accumulates bf16 gradients in fp32 only under "
            "ZeRO-1, so small gradients would be lost; use parallel.zero=1 (at one data-parallel rank it costs "
            "nothing), or train.precision=fp32"
        ]
    return []


def _compile(config: RunConfig) -> list[str]:
    if not config.train.compile:
        return []
    problems = []
    if config.train.recompute == "selective":
        problems.append(
            "train.compile = true with train.recompute = selective: a compiled block itself chooses which tensors it "
            "keeps, and selective recomputation would find none to replace; set train.recompute to off or block, or "
            "train.compile=false"
        )
    if config.parallel.zero == 3:
        problems.append(
            "train.compile = true with parallel.zero = 3: ZeRO-3 fetches a parameter when its own layer runs, so a "
            "block would be traced with weights that have no elements; use parallel.zero=2 or lower, or "
            "train.compile=false"
        )
    return problems


def _vision(config: RunConfig) -> list[str]:
    parallel = config.parallel
    if parallel.encodes_ahead and parallel.zero >= 2:
        return [
            f"parallel.vision = {parallel.vision} with parallel.zero = {parallel.zero}: ZeRO-2 and 3 partition "
            "gradients in the hooks of each backward pass, but these towers get theirs after the passes of a step; use "
            "parallel.zero=1, or parallel.vision=replicated"
        ]
    if parallel.vision != "sharded" or parallel.zero < 3 or parallel.tensor == 1:
        return []
    return [
        f"parallel.vision = sharded with parallel.zero = 3 and parallel.tensor = {parallel.tensor}: ZeRO-3 fetches a "
        "parameter when its own layer runs, but shared images need all of a tower's beforehand; use "
        "parallel.vision=replicated, or parallel.zero=2"
    ]


def _expert_ranks(config: RunConfig, dp: int) -> list[str]:
    expert = config.parallel.expert
    if dp % expert == 0:
        return []
    return [
        f"{dp} data-parallel ranks are not divisible by parallel.expert = {expert}: the ranks that hold different "
        f"experts are neighbours on the data axis; start a multiple of {expert * config.parallel.model} ranks, or "
        f"choose a divisor of {dp}"
    ]


def _positions(config: RunConfig) -> list[str]:
    limit, seq_len = config.model.decoder.max_positions, config.data.seq_len
    if seq_len <= limit:
        return []
    return [f"data.seq_len = {seq_len} is above model.decoder.max_positions = {limit}: shorten it, or raise the limit"]


def _sampler(config: RunConfig) -> list[str]:
    return sampler_problems(config.data, config.model)


def _text_ratio(config: RunConfig) -> list[str]:
    ratio, steps = config.data.text_ratio, config.train.steps
    if ratio.steps <= steps:
        return []
    return [
        f"data.text_ratio.steps = {ratio.steps} is above train.steps = {steps}: the ratio would never reach "
        f"data.text_ratio.final = {ratio.final:g}; set data.text_ratio.steps to {steps} or fewer"
    ]


def _trainable(config: RunConfig) -> list[str]:
    names = [parameter.name for parameter in parameters(config.model) if parameter.trained]
    problems = [
        f"optim.rules[{index}].match = {rule.match!r} matches no parameter of the model, so it would do nothing: names "
        "are like stem.siglip.norm.weight, stem.adaptor.proj.weight, blocks.0.attn.q_proj.weight, head.proj.weight"
        for index, rule in enumerate(config.optim.rules)
        if not any(rule.matches(name) for name in names)
    ]
    if not any(config.optim.lr_multiplier(name) for name in names):
        problems.append(
            "optim.rules freeze every parameter: nothing would be trained; give one a lr_multiplier above 0"
        )
    return problems


def _warmup(config: RunConfig) -> list[str]:
    warmup, steps = config.optim.schedule.warmup_steps, config.train.steps
    if warmup <= steps:
        return []
    return [
        f"optim.schedule.warmup_steps = {warmup} is above train.steps = {steps}: the learning rate would never reach "
        f"its peak; set optim.schedule.warmup_steps to {steps} or fewer"
    ]


_RUN_RULES = (
    _tensor,
    _sequence,
    _whole_experts,
    _experts,
    _balance,
    _stages,
    _schedule,
    _zero,
    _compile,
    _vision,
    _positions,
    _sampler,
    _text_ratio,
    _trainable,
    _warmup,
)
