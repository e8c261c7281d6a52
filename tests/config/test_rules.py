import pytest
from pydantic import ValidationError

from megavl.config.error import ConfigError
from megavl.config.presets import PRESETS
from megavl.config.rules import check
from tests.config.runs import make_run


def problems(world: int, **changes) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        check(make_run(**changes), world)
    return raised.value.problems


def only_problem(world: int, **changes) -> str:
    (problem,) = problems(world, **changes)
    return problem


def test_every_small_topology_fits_the_debug_model():
    for world in (1, 2, 3, 4, 6, 8):
        for tensor in range(1, world + 1):
            for pipeline in range(1, world + 1):
                if world % (tensor * pipeline) == 0:
                    for sequence in (False, True):
                        check(
                            make_run(parallel={"tensor": tensor, "pipeline": pipeline, "sequence": sequence}),
                            world,
                        )


class TestWorld:
    def test_does_not_divide(self):
        assert only_problem(9, parallel={"tensor": 2, "pipeline": 2}) == (
            "9 ranks are not divisible by parallel.tensor * parallel.pipeline = 2 * 2 = 4: start 8 or 12 "
            "ranks, or cut the model otherwise"
        )

    def test_the_proposed_worlds_start(self):
        """12 and 20 ranks would not start: 3 and 5 data-parallel ranks are not divisible by 2 expert ranks."""
        changes = {"model": PRESETS["vl2_debug"], "parallel": {"pipeline": 4, "expert": 2}}
        assert only_problem(18, **changes).count("start 16 or 24 ranks") == 1
        for world in (16, 24):
            check(make_run(**changes), world)

    def test_too_small(self):
        assert "1 ranks are not divisible" in only_problem(1, parallel={"tensor": 2})


class TestTensor:
    @pytest.mark.parametrize(
        ("field", "size"), [("heads", 24), ("kv_heads", 24), ("mlp_width", 240), ("vocab_size", 2400)]
    )
    def test_does_not_divide(self, field, size):
        found = problems(7, parallel={"tensor": 7})
        assert (
            f"model.decoder.{field} = {size} is not divisible by parallel.tensor = 7, over which it is cut: choose a "
            f"divisor of {size}"
        ) in found

    def test_sequence(self):
        changes = {"data": {"seq_len": 190}, "parallel": {"tensor": 4, "sequence": True}}
        problem = only_problem(4, **changes)
        assert "train.micro_batch * seq_len = 1 * 190 = 190, are not divisible by parallel.tensor = 4" in problem
        assert "parallel.sequence=false" in problem
        check(make_run(data={"seq_len": 190}, parallel={"tensor": 4}), 4)

    def test_sequence_on_one_tensor_rank_is_harmless(self):
        check(make_run(data={"seq_len": 191}, parallel={"sequence": True}), 1)


class TestStages:
    def test_do_not_divide(self):
        problem = only_problem(5, parallel={"pipeline": 5, "stages": None})
        assert "the model list has 24 items (stem, 22 blocks, head)" in problem
        assert "parallel.pipeline * parallel.virtual_stages = 5 * 1 = 5" in problem
        assert problem.endswith("parallel.stages=[4, 5, 5, 5, 5], or have their work balanced, parallel.stages=auto")

    @pytest.mark.parametrize("stages", ["automatic", 4])
    def test_of_no_kind(self, stages):
        with pytest.raises(ValidationError, match=r"write auto, null, or a list") as error:
            make_run(parallel={"pipeline": 5, "stages": stages})
        assert error.value.error_count() == 1

    def test_the_proposals_are_accepted(self):
        for stages in ([4, 5, 5, 5, 5], "auto"):
            check(make_run(parallel={"pipeline": 5, "stages": stages}), 5)

    @pytest.mark.parametrize("stages", [[12, 11], [8, 8, 8]])
    def test_do_not_add_up(self, stages):
        problem = only_problem(2, parallel={"pipeline": 2, "stages": stages})
        assert f"parallel.stages = {stages} has {len(stages)} entries with the sum {sum(stages)}" in problem
        assert "there are parallel.pipeline * parallel.virtual_stages = 2 * 1 = 2 stages" in problem
        assert "24 items" in problem

    def test_more_than_items(self):
        problem = only_problem(
            8, parallel={"pipeline": 8}, model={"decoder": {"layers": 4}}, train={"global_batch": 24}
        )
        assert "6 items (stem, 4 blocks, head), fewer than the 8 stages" in problem


class TestCompile:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"train": {"compile": True, "recompute": "selective"}}, "train.recompute = selective: a compiled block"),
            ({"train": {"compile": True}, "parallel": {"zero": 3}}, "parallel.zero = 3: ZeRO-3 fetches a parameter"),
        ],
    )
    def test_what_it_cannot_be_with(self, changes, words):
        problem = only_problem(1, **changes)
        assert problem.startswith("train.compile = true with ") and words in problem
        assert problem.endswith("or train.compile=false")

    def test_what_it_can_be_with(self):
        check(make_run(train={"compile": True, "recompute": "block"}, parallel={"zero": 2}), 1)


class TestZero:
    def test_shared_images_under_partitioned_weights(self):
        shared = {"tensor": 2, "vision": "sharded", "zero": 3}
        assert "ZeRO-3 fetches a parameter when its own layer runs" in only_problem(2, parallel=shared)
        check(make_run(parallel=shared | {"zero": 2}), 2)
        check(make_run(parallel=shared | {"tensor": 1}), 1)

    @pytest.mark.parametrize("vision", ["pipelined", "balanced"])
    @pytest.mark.parametrize("zero", [2, 3])
    def test_partitioned_gradients_of_towers_that_encode_ahead(self, zero, vision):
        parallel = {"vision": vision, "zero": zero}
        problem = only_problem(2, parallel=parallel)
        assert f"parallel.vision = {vision} with parallel.zero = {zero}: ZeRO-2 and 3 partition gradients" in problem
        assert problem.endswith("use parallel.zero=1, or parallel.vision=replicated")
        check(make_run(parallel=parallel | {"zero": 1}), 2)

    @pytest.mark.parametrize("zero", [2, 3])
    def test_partitioned_gradients_in_a_pipeline(self, zero):
        problem = only_problem(2, parallel={"zero": zero, "pipeline": 2})
        assert f"parallel.zero = {zero} with parallel.pipeline = 2" in problem
        assert "hooks of each backward pass" in problem and "use parallel.zero=1" in problem
        check(make_run(parallel={"zero": zero}), 2)

    def test_0_in_bf16(self):
        problem = only_problem(1, parallel={"zero": 0})
        assert "accumulates bf16 gradients in fp32 only under ZeRO-1" in problem and "use parallel.zero=1" in problem
        check(make_run(parallel={"zero": 0}, train={"precision": "fp32"}), 1)


class TestExperts:
    """On the debug form of DeepSeek-VL2 Base: 8 routed experts 32 wide, 2 shared ones, sigmoid router with a bias."""

    VL2 = PRESETS["vl2_debug"].model_dump(mode="json")

    def only_problem(self, world: int, **changes) -> str:
        return only_problem(world, **{"model": self.VL2} | changes)

    def test_tensor_ranks_cut_what_experts_share(self):
        wide = self.VL2 | {"decoder": self.VL2["decoder"] | {"heads": 24, "kv_heads": 24}}
        changes = {"model": wide, "parallel": {"tensor": 3, "pipeline": 2}, "train": {"global_batch": 24}}
        assert only_problem(6, **changes) == (
            "model.decoder.moe.shared * width = 64 is not divisible by parallel.tensor = 3, over which it is cut: "
            "choose a divisor of 64"
        )
        changes["parallel"] |= {"expert_width": "cut"}
        assert any(problem.startswith("model.decoder.moe.width = 32") for problem in problems(6, **changes))

    def test_key_value_heads_have_no_meaning_under_latent_attention(self):
        assert not any("kv_heads" in problem for problem in problems(7, model=self.VL2, parallel={"tensor": 7}))

    def test_tensor_ranks_share_the_tokens_of_whole_experts(self):
        problem = self.only_problem(4, data={"seq_len": 190}, parallel={"tensor": 4})
        assert "train.micro_batch * seq_len = 1 * 190 = 190, which are not divisible by parallel.tensor = 4" in problem
        assert problem.endswith("set parallel.expert_width=cut")
        check(make_run(model=self.VL2, data={"seq_len": 190}, parallel={"tensor": 4, "expert_width": "cut"}), 4)

    def test_expert_ranks(self):
        assert self.only_problem(4, parallel={"tensor": 2, "expert": 4}) == (
            "2 data-parallel ranks are not divisible by parallel.expert = 4: the ranks that hold different experts are "
            "neighbours on the data axis; start a multiple of 8 ranks, or choose a divisor of 2"
        )
        assert self.only_problem(3, parallel={"expert": 3}) == (
            "model.decoder.moe.experts = 8 is not divisible by parallel.expert = 3, over which the experts are spread: "
            "choose a divisor of 8"
        )
        check(make_run(model=self.VL2, parallel={"tensor": 2, "expert": 4}), 8)

    def test_a_model_without_experts(self):
        assert only_problem(2, parallel={"expert": 2}) == (
            "parallel.expert = 2, but vl_debug has no routed experts to spread over ranks: set parallel.expert=1"
        )
        assert problems(1, balance={"auxiliary_weight": 0.01, "bias_step": 0.001}) == [
            "balance.auxiliary_weight = 0.01, but vl_debug has no routed experts to balance: set "
            "balance.auxiliary_weight=0",
            "balance.bias_step = 0.001, but vl_debug has no routed experts to balance: set balance.bias_step=0",
        ]

    def test_only_a_sigmoid_router_has_a_bias(self):
        softmax = PRESETS["vl2_debug_mla"].model_dump(mode="json")
        problem = only_problem(1, model=softmax, balance={"bias_step": 0.001})
        assert "balance.bias_step = 0.001, but the router of vl2_debug_mla is softmax and has no bias" in problem
        check(make_run(model=softmax, balance={"auxiliary_weight": 0.001}), 1)
        check(make_run(model=self.VL2, balance={"auxiliary_weight": 0.001, "bias_step": 0.001}), 1)

    def test_partitioned_weights(self):
        problem = self.only_problem(2, parallel={"zero": 3, "expert": 2})
        assert "parallel.zero = 3 with parallel.expert = 2" in problem and "use parallel.zero=1 or 2" in problem
        check(make_run(model=self.VL2, parallel={"zero": 3}), 2)


class TestSchedule:
    @pytest.mark.parametrize(("pipeline", "count"), [(4, 3), (2, 7), (4, 9)])
    def test_any_number_of_micro_batches(self, pipeline, count):
        interleaved = {"schedule": "interleaved", "virtual_stages": 2}
        for schedule in ({}, interleaved):
            check(make_run(parallel={"pipeline": pipeline} | schedule, train={"global_batch": count}), pipeline)

    def test_several_stages_on_a_rank(self):
        problem = only_problem(2, parallel={"pipeline": 2, "virtual_stages": 2})
        assert "set parallel.schedule=interleaved, or parallel.virtual_stages=1" in problem

    @pytest.mark.parametrize("sizes", [{"pipeline": 2}, {"virtual_stages": 2}])
    def test_nothing_to_interleave(self, sizes):
        problem = only_problem(sizes.get("pipeline", 1), parallel={"schedule": "interleaved"} | sizes)
        assert "nothing to interleave" in problem and "parallel.schedule=1f1b" in problem

    @pytest.mark.parametrize("sizes", [{"pipeline": 2}, {"pipeline": 2, "virtual_stages": 3}, {"virtual_stages": 2}])
    def test_two_stages_a_rank_for_dualpipev(self, sizes):
        problem = only_problem(sizes.get("pipeline", 1), parallel={"schedule": "dualpipev"} | sizes)
        assert "set parallel.virtual_stages=2 and parallel.pipeline above 1" in problem
        check(make_run(parallel={"schedule": "dualpipev", "virtual_stages": 2, "pipeline": 2}), 2)

    @pytest.mark.parametrize("name", ["zero-bubble", "zb1p", "zbv"])
    def test_why_there_is_no_zero_bubble(self, name):
        with pytest.raises(ValidationError, match=f"{name} is not supported: .* compute both in one backward pass"):
            make_run(parallel={"schedule": name, "pipeline": 2})


class TestData:
    def test_positions(self):
        assert "data.seq_len = 600 is above model.decoder.max_positions = 512" in only_problem(1, data={"seq_len": 600})

    def test_a_schedule_of_the_text_ratio_that_the_run_does_not_reach(self):
        schedule = {"start": 1.0, "final": 0.7, "steps": 21}
        problem = only_problem(1, data={"text_ratio": schedule})
        assert "data.text_ratio.steps = 21 is above train.steps = 20" in problem and "to 20 or fewer" in problem
        check(make_run(data={"text_ratio": schedule | {"steps": 20}}), 1)

    def test_a_schedule_needs_the_kinds_that_it_passes(self):
        problem = only_problem(1, data={"text_ratio": {"start": 1.0, "final": 0.0, "steps": 5}, "text": []})
        assert "data.text_ratio = 1 asks for text steps" in problem
        check(make_run(data={"text_ratio": {"start": 1.0, "final": 0.0}, "text": []}), 1)


class TestOptim:
    def test_rule_that_matches_nothing(self):
        problem = only_problem(1, optim={"rules": [{"match": "stem.sma", "lr_multiplier": 0}]})
        assert "optim.rules[0].match = 'stem.sma' matches no parameter of the model" in problem

    def test_everything_frozen(self):
        assert "freeze every parameter" in only_problem(1, optim={"rules": [{"match": "", "lr_multiplier": 0}]})

    def test_warmup_longer_than_the_run(self):
        problem = only_problem(1, optim={"schedule": {"warmup_steps": 21}})
        assert "optim.schedule.warmup_steps = 21 is above train.steps = 20" in problem


def test_all_rules_at_once():
    found = problems(
        6,
        parallel={"tensor": 4, "pipeline": 5, "stages": None, "zero": 2, "sequence": True},
        model={"decoder": {"vocab_size": 2402}},
        data={"seq_len": 513, "text": []},
        optim={"rules": [{"match": "nothing"}], "schedule": {"warmup_steps": 99}},
    )
    parts = ("ranks are not", "vocab_size", "parallel.sequence", "model list", "ZeRO-2", "max_positions", "data.text ")
    for part in (*parts, "matches no parameter", "warmup_steps"):
        assert sum(part in problem for problem in found) == 1, part
    assert len(found) == len(parts) + 2
