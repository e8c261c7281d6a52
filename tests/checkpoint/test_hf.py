"""Both layouts: transformers loads what is exported, and what is read back is what was written, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavl.batch import Batch
from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.fragments import Fragment
from megavl.checkpoint.hf import LAYOUTS, from_hf, to_hf
from megavl.checkpoint.layout import latest, read_state
from megavl.checkpoint.load import load_weights
from megavl.checkpoint.maps import deepseek_vl_v2, multi_modality, transformers
from megavl.checkpoint.maps.fields import Fields
from megavl.checkpoint.reader import Checkpoint
from megavl.config.parameters import parameters
from megavl.config.presets import PRESETS
from megavl.config.tiles import Tiling
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import TensorAxis
from tests.checkpoint.models import (
    HYBRID,
    MHA_SOFTMAX,
    MLA_SIGMOID,
    MLA_SOFTMAX,
    SIGLIP_ONLY,
    train_tokenizer,
    weights,
    write_checkpoint,
)
from tests.models import changed

MODELS = {"hybrid": HYBRID, "siglip": SIGLIP_ONLY}
VL2 = {"mha_softmax": MHA_SOFTMAX, "mla_softmax": MLA_SOFTMAX, "mla_sigmoid": MLA_SIGMOID}
# Every model in every layout that it has.
FORMS = pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(pytest.param(model, layout, id=f"{name} {layout}") for name, model in MODELS.items() for layout in LAYOUTS),
        *(pytest.param(model, "deepseek", id=name) for name, model in VL2.items()),
    ],
)


def silent(line: str) -> None:
    """A report that nobody reads."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def _all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


# -- transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_export(tmp_path, tokenizer, model, dtype):
    classes = pytest.importorskip("transformers")
    path = write_checkpoint(tmp_path / "checkpoints", model, dtype, tokenizer)
    to_hf(path, tmp_path / "hf", "transformers", report=silent)
    name = "DeepseekVLHybridForConditionalGeneration" if model.sam else "DeepseekVLForConditionalGeneration"
    loaded, report = getattr(classes, name).from_pretrained(tmp_path / "hf", output_loading_info=True, dtype="auto")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert loaded.dtype == dtype
    state, expected = loaded.state_dict(), weights(model, dtype)
    assert len(state) == sum(len(rule.theirs) for rule in transformers.tensor_rules(model))
    for rule in transformers.tensor_rules(model):
        for theirs, tensor in rule.export(expected[rule.ours]).items():
            key = theirs.replace("model.vision_model.vision_model.", "model.vision_model.")  # as this version names it
            assert torch.equal(state[key], tensor), key
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    text = loaded.config.text_config
    assert (text.rope_parameters["rope_theta"], text.rms_norm_eps) == (10000.0, 1e-6)
    assert (text.bos_token_id, text.eos_token_id) == (1, 2)
    assert loaded.generation_config.eos_token_id == 2


@FORMS
def test_config_describes_the_model_again(model, layout):
    form = LAYOUTS[layout][model.family]
    config = json.loads(json.dumps(form.config_json(model, "float32", {})))
    image = json.loads(json.dumps(next(iter(form.processor_json(model, "<image>").values()))))
    assert form.model_config(Fields(config, "config"), Fields(image, "image"), model.name) == model


def test_config_saved_by_transformers_is_read(tmp_path, model):
    """save_pretrained nests the tower once and writes another form of config.json; all of it is read."""
    classes = pytest.importorskip("transformers")
    path = write_checkpoint(tmp_path / "checkpoints", model, torch.float32)
    to_hf(path, tmp_path / "hf", "transformers", report=silent)
    name = "DeepseekVLHybridForConditionalGeneration" if model.sam else "DeepseekVLForConditionalGeneration"
    loaded = getattr(classes, name).from_pretrained(tmp_path / "hf")
    anew = getattr(classes, name)(loaded.config)  # one that was loaded is saved under the names that it came with
    anew.load_state_dict(loaded.state_dict())
    anew.save_pretrained(tmp_path / "saved")
    assert any(key.startswith("model.vision_model.embeddings.") for key in _all_tensors(tmp_path / "saved"))
    _equal_weights(from_hf(tmp_path / "saved", tmp_path / "back"), model, torch.float32)


def test_published_shapes():
    """The 7B and 1.3B as published: numbers of tensors, and the shapes that config.json leads back to."""
    for name, count in {"vl_7b": 854, "vl_1b": 612}.items():
        assert sum(len(rule.theirs) for rule in transformers.tensor_rules(PRESETS[name])) == count
    released = multi_modality.config_json(PRESETS["vl_7b"], "float16", {})
    params = released["vision_config"]["params"]
    assert params["high_res_cfg"]["model_name"] == "sam_b_downsample"
    assert params["low_res_cfg"]["model_name"] == "siglip_large_patch16_384"
    sizes = {
        shape: sum(
            torch.Size(s).numel() for n, s in multi_modality.unused_shapes(PRESETS["vl_7b"]).items() if shape in n
        )
        for shape in ("attn_pool", "layer_norm")
    }
    assert sizes == {"attn_pool": 12_595_200, "layer_norm": 4 * 1024}


# -- round trips


def _equal_weights(path: Path, model, dtype) -> None:
    """A converted checkpoint holds exactly the weights of `write_checkpoint`, and nothing else."""
    checkpoint = Checkpoint(path)
    expected = weights(model, dtype)
    assert set(checkpoint.tensors) == {f"param.{name}" for name in expected}
    for name, tensor in expected.items():
        read = checkpoint.read_tensor(f"param.{name}", tensor.dtype)
        assert checkpoint.dtype(f"param.{name}") == tensor.dtype
        assert torch.equal(read, tensor), name


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path, tokenizer, model, layout, dtype):
    path = write_checkpoint(tmp_path / "checkpoints", model, dtype, tokenizer)
    to_hf(tmp_path / "checkpoints", tmp_path / "hf", layout, max_shard_bytes=200_000, report=silent)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) >= 3
    back = from_hf(tmp_path / "hf", tmp_path / "back")
    _equal_weights(back, model, dtype)
    assert back == latest(tmp_path / "back")
    assert Checkpoint(back).state["config"]["model"] == read_state(path)["config"]["model"] | {"name": "hf"}
    to_hf(back, tmp_path / "again", layout, tokenizer, max_shard_bytes=200_000, report=silent)
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_run_starts_from_a_converted_checkpoint(tmp_path, model):
    to_hf(write_checkpoint(tmp_path / "a", model, torch.float32), tmp_path / "hf", "deepseek", report=silent)
    back = from_hf(tmp_path / "hf", tmp_path / "back")
    fragments = [
        Fragment.whole(p.name, "param", p.shape, (0,) * len(p.shape), torch.zeros(p.shape)) for p in parameters(model)
    ]
    load_weights(back, fragments, model, None)
    for fragment in fragments:
        assert torch.equal(fragment.values, weights(model, torch.float32)[fragment.name].view(-1))


def test_deepseek_layout_has_what_the_released_code_builds(tmp_path, model):
    to_hf(write_checkpoint(tmp_path / "a", model, torch.float32), tmp_path / "one", "deepseek", report=silent)
    to_hf(tmp_path / "a", tmp_path / "two", "deepseek", report=silent)
    tensors, again = _all_tensors(tmp_path / "one"), _all_tensors(tmp_path / "two")
    tower = "vision_model.vision_tower_low.vision_tower" if model.sam else "vision_model.vision_tower"
    width = model.siglip.width
    assert tensors[f"{tower}.attn_pool.kv.weight"].shape == (2 * width, width)
    assert tensors[f"{tower}.attn_pool.latent"].shape == (1, 1, width)
    assert tensors[f"{tower}.blocks.1.attn.qkv.weight"].shape == (3 * width, width)
    assert ("vision_model.high_layer_norm.weight" in tensors) == (model.sam is not None)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["vision_config"]["cls"] == ("HybridVisionTower" if model.sam else "CLIPVisionTower")
    assert config["aligner_config"]["params"]["n_embed"] == model.decoder.width


def test_vl2_layout_has_what_the_released_code_builds(tmp_path):
    """The released names and shapes, one tensor for each expert; the bias of a router in fp32."""
    model = MLA_SIGMOID
    to_hf(write_checkpoint(tmp_path / "a", model, torch.bfloat16), tmp_path / "hf", "deepseek", report=silent)
    tensors = _all_tensors(tmp_path / "hf")
    moe, mla, width = model.decoder.moe, model.decoder.mla, model.decoder.width
    layer = "language.model.layers.1"
    expected = {
        "vision.pos_embed": (1, 49, 48),
        "vision.blocks.1.attn.qkv.weight": (3 * 48, 48),
        "vision.attn_pool.latent": (1, 1, 48),
        "projector.layers.0.weight": (width, 4 * 48),
        "projector.layers.2.bias": (width,),
        "image_newline": (width,),
        "view_seperator": (width,),
        "language.lm_head.weight": (640, width),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (mla.kv_rank + mla.rope_width, width),
        f"{layer}.self_attn.kv_a_layernorm.weight": (mla.kv_rank,),
        f"{layer}.mlp.gate.weight": (moe.experts, width),
        f"{layer}.mlp.gate.e_score_correction_bias": (moe.experts,),
        f"{layer}.mlp.shared_experts.up_proj.weight": (moe.shared * moe.width, width),
        "language.model.layers.0.mlp.down_proj.weight": (width, model.decoder.mlp_width),
    }
    assert expected.items() <= {name: tuple(tensor.shape) for name, tensor in tensors.items()}.items()
    weight = weights(model, torch.bfloat16)["blocks.1.mlp.experts.down_proj"]
    for expert in range(moe.experts):
        assert torch.equal(tensors[f"{layer}.mlp.experts.{expert}.down_proj.weight"], weight[expert])
    assert tensors[f"{layer}.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert sum(tensor.numel() for name, tensor in tensors.items() if "attn_pool" not in name) == sum(
        parameter.size for parameter in parameters(model)
    )


@pytest.mark.parametrize("model", [MLA_SOFTMAX, MLA_SIGMOID], ids=["deepseek_v2", "deepseek_v3"])
def test_transformers_loads_the_language_part_of_vl2(tmp_path, model):
    """Its tensors without "language.", and the language_config as it is, by from_pretrained."""
    classes = pytest.importorskip("transformers")
    to_hf(write_checkpoint(tmp_path / "a", model, torch.float32), tmp_path / "hf", "deepseek", report=silent)
    family = "DeepseekV2" if model is MLA_SOFTMAX else "DeepseekV3"
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())["language_config"]
    del fields["model_type"]  # deepseek_v2 stands there for both
    getattr(classes, f"{family}Config")(**fields).save_pretrained(tmp_path / "language")
    tensors = _all_tensors(tmp_path / "hf")
    language = {name.removeprefix("language."): t for name, t in tensors.items() if name.startswith("language.")}
    save_file(language, tmp_path / "language" / "model.safetensors", {"format": "pt"})
    loaded, report = getattr(classes, f"{family}ForCausalLM").from_pretrained(
        tmp_path / "language", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ours = VLM(model, TensorAxis(), choose(torch.device("cpu")), 0, model.layers)
    ours.load_state_dict(weights(model, torch.float32))
    tokens = torch.randint(600, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        no_tiles = torch.zeros(0, 3, model.pixel_tower.image_size, model.pixel_tower.image_size, dtype=torch.uint8)
        batch = Batch.of(Tiling(model), tokens, labels=tokens, lengths=[40], packs=1, pixels=no_tiles)
        mine = ours.logits(batch)
        theirs = loaded(tokens[None], use_cache=False).logits[0]
    assert (mine - theirs).abs().max() < 5e-6  # measured 1.0e-6, of logits up to 2.3


def test_published_config_of_vl2():
    """What the released files say where they say it, and that what they leave out leads back to the presets."""
    for name, preset in PRESETS.items():
        if preset.family == "vl" or "debug" in name:
            continue
        config = deepseek_vl_v2.config_json(preset, "bfloat16", {})
        assert config["candidate_resolutions"][:4] == [[384, 384], [384, 768], [768, 384], [384, 1152]]
        assert len(config["candidate_resolutions"]) == 23
        assert config["vision_config"]["mlp_ratio"] == 3.7362
        del config["image_token_id"]
        for field in ("image_size", "heads"):
            del config["vision_config"][field]
        read = deepseek_vl_v2.model_config(Fields(config, "config"), Fields({}, "image"), name)
        assert read == preset
    pool = deepseek_vl_v2.unused_shapes(PRESETS["vl2_tiny"])
    tower = sum(p.size for p in parameters(PRESETS["vl2_tiny"]) if p.name.startswith("stem.siglip"))
    assert tower + sum(torch.Size(shape).numel() for shape in pool.values()) == 428_225_600  # SigLIP-SO400M


# -- refusals


def test_transformers_layout_of_vl2_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "a", MLA_SOFTMAX, torch.float32)
    with pytest.raises(CheckpointError, match="transformers has no model of the family of tiny.*--layout deepseek"):
        to_hf(checkpoint, tmp_path / "hf", "transformers", report=silent)
    assert not (tmp_path / "hf").exists()


def test_vl2_that_the_released_code_cannot_compute_is_refused(tmp_path):
    model = changed(MLA_SOFTMAX, siglip={"gelu_approximation": "none"}, decoder={"norm_eps": 1e-5})
    with pytest.raises(
        CheckpointError, match=r"gelu_approximation = none, there tanh; decoder.norm_eps = 1e-05, there"
    ):
        to_hf(write_checkpoint(tmp_path / "a", model, torch.float32), tmp_path / "hf", "deepseek", report=silent)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "tile_tag", "1D", "tile_tag is '1D'"),
        (None, "candidate_resolutions", [[30, 30], [60, 60]], "candidate_resolutions is"),
        ("projector_config", "depth", 3, "depth is 3"),
        ("language_config", "q_lora_rank", 1536, "q_lora_rank is 1536"),
        ("language_config", "n_group", 8, "n_group is 8"),
        ("language_config", "topk_method", "group_limited_greedy", "topk_method is 'group_limited_greedy'"),
        ("language_config", "scoring_func", "relu", "scoring_func is 'relu', .* 'softmax' or 'sigmoid'"),
    ],
)
def test_other_configs_of_vl2_are_refused(section, field, value, message):
    config = deepseek_vl_v2.config_json(MLA_SOFTMAX, "float32", {})
    (config if section is None else config[section])[field] = value
    with pytest.raises(CheckpointError, match=message):
        deepseek_vl_v2.model_config(Fields(config, "config"), Fields({}, "image"), "x")


@pytest.fixture
def exported(tmp_path) -> Path:
    to_hf(write_checkpoint(tmp_path / "a", HYBRID, torch.float32), tmp_path / "hf", "transformers", report=silent)
    return tmp_path / "hf"


def _edit(directory: Path, change) -> None:
    tensors = _all_tensors(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_missing_unknown_and_misshaped_tensors_are_listed(exported, tmp_path):
    def change(tensors):
        del tensors["lm_head.weight"]
        tensors["model.extra.weight"] = torch.zeros(2)
        tensors["model.aligner.proj.bias"] = torch.zeros(3)

    _edit(exported, change)
    with pytest.raises(CheckpointError) as error:
        from_hf(exported, tmp_path / "back")
    for part in (
        "1 missing: lm_head.weight",
        "1 unknown: model.extra.weight",
        r"model.aligner.proj.bias [3] instead of [96]",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "model_type", "llava", "model_type 'llava' is none of"),
        ("text_config", "hidden_act", "gelu", "text_config: hidden_act is 'gelu'"),
        ("text_config", "rope_scaling", {"type": "linear"}, "rope_scaling"),
        ("vision_config", "hidden_act", "relu", "vision_config: hidden_act is 'relu'.* 'gelu' or 'gelu_pytorch_tanh'"),
        ("text_config", "hidden_size", -1, "does not describe a model"),
    ],
)
def test_other_models_are_refused(exported, tmp_path, section, field, value, message):
    config = json.loads((exported / "config.json").read_text())
    (config if section is None else config[section])[field] = value
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        from_hf(exported, tmp_path / "back")


def test_truncated_and_absent_files_are_refused(exported, tmp_path):
    data = (exported / "model.safetensors").read_bytes()
    (exported / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_hf(exported, tmp_path / "back")
    (exported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only safetensors checkpoints are read"):
        from_hf(exported, tmp_path / "back")


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    path = write_checkpoint(tmp_path / "a", HYBRID, torch.float32, tokenizer=tmp_path / "gone.model")
    with pytest.raises(CheckpointError, match="tokenizer .*gone.model is not there.*--tokenizer"):
        to_hf(path, tmp_path / "hf", "transformers", report=silent)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").touch()
    with pytest.raises(CheckpointError, match="not overwritten"):
        to_hf(path, tmp_path / "hf", "transformers", report=silent)


def test_deepseek_layout_refuses_towers_of_different_widths(tmp_path):
    wider = changed(HYBRID, siglip={"width": 64})
    with pytest.raises(CheckpointError, match="48 channels, SigLIP's 64"):
        to_hf(write_checkpoint(tmp_path / "a", wider, torch.float32), tmp_path / "hf", "deepseek", report=silent)
    assert not (tmp_path / "hf").exists()


# -- memory

# VmHWM, not ru_maxrss: the latter begins with the memory of the process that forked.
_MEASURE = """
import sys
from pathlib import Path
from megavl.checkpoint import save
from megavl.checkpoint.hf import LAYOUTS, from_hf, to_hf
def peak_mb():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
save._FILE_BYTES = 12_000_000
def there_and_back(name):
    to_hf(name, name + ".hf", "transformers", max_shard_bytes=12_000_000, report=lambda line: None)
    exported = peak_mb()
    from_hf(name + ".hf", name + ".back")
    return exported, peak_mb()
before = there_and_back(sys.argv[1])[1]  # a small model: what the libraries take at their first use
print(*(peak - before for peak in there_and_back(sys.argv[2])))
"""


def test_memory_is_about_one_shard(tmp_path):
    """101 MB of parameters, the largest tensor of 12 MB, in shards of 12 MB. Peaks grew by 0 to 4, then 15 to 28 MB."""
    model = changed(HYBRID, decoder={"layers": 6, "width": 512, "mlp_width": 1536, "vocab_size": 5800})
    assert sum(parameter.size for parameter in parameters(model)) * 4 > 100e6
    write_checkpoint(tmp_path / "small", HYBRID, torch.float32)
    write_checkpoint(tmp_path / "large", model, torch.float32)
    names = [str(tmp_path / name) for name in ("small", "large")]
    output = subprocess.check_output([sys.executable, "-c", _MEASURE, *names], text=True)
    print(output)
    assert len(list((tmp_path / "large.hf").glob("*.safetensors"))) >= 8
    assert max(map(float, output.split())) < 50
