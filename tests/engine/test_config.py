import pytest
import yaml

from ssast.engine.config import VALID_MASKED_FRACTION, differences, dump_config, list_presets, load_config
from ssast.engine.dry_run import describe_run
from ssast.engine.errors import UserError
from ssast.engine.finetune.config import FinetuneConfig
from ssast.engine.model.adapt import build_model
from ssast.engine.model.cost import count_parameters, flops_per_clip

PUBLISHED = {
    "ssast-tiny-patch-400": (6_046_290, (8, 64), 400),
    "ssast-tiny-frame-400": (6_046_290, (1, 512), 400),
    "ssast-small-patch-400": (22_854_354, (8, 64), 400),
    "ssast-base-patch-400": (88_763_346, (8, 64), 400),
    "ssast-base-patch-250": (88_763_346, (8, 64), 250),
    "ssast-base-frame-400": (88_763_346, (1, 512), 400),
    "ssast-base-frame-250": (88_763_346, (1, 512), 250),
}
VISIBLE = ("tiny-patch", "small-patch", "base-patch", "base-frame")


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    parameters, grid, masked = PUBLISHED[name]
    config = load_config(name)
    assert config.run.name == name
    assert config.architecture.grid == grid and config.mask.num_masked == masked and config.valid_num_masked == 400
    assert (config.mask.cluster is None) == ("frame" in name)
    width = config.architecture.width
    unused = 2 + 2 * 1000 * (width + 1)  # p_input_*, and DeiT's two heads, which official files carry along
    assert count_parameters(build_model(config.architecture)) == parameters - unused
    assert config.deepspeed["optimizer"]["params"]["betas"] == [0.95, 0.999]
    assert config.train.steps * config.deepspeed["train_batch_size"] == 19_200_000


def test_every_preset_is_listed_and_valid():
    assert set(list_presets()) == {*PUBLISHED, *(f"ssast-{name}-400-visible" for name in VISIBLE), "demo"}
    for name in list_presets():
        assert load_config(name, ["data.train=/audio"]).data.train == ["/audio"]


@pytest.mark.parametrize("name", VISIBLE)
def test_presets_of_visible_encoders_differ_in_one_thing(name):
    whole, visible = (load_config(f"ssast-{name}-400{suffix}").model_dump() for suffix in ("", "-visible"))
    assert [key for key, *_ in differences(whole, visible)] == ["model.encoder_tokens", "run.name"]


def test_a_dry_run_tells_both_kinds_apart():
    whole, visible = (describe_run(load_config(f"ssast-base-patch-400{suffix}")) for suffix in ("", "-visible"))
    assert "encoder 12 of width 768 on 514 tokens\n" in whole and "training 295.78 G" in whole
    assert "encoder 12 of width 768 on 114 tokens, decoder 2 of width 768 on 514 tokens\n" in visible
    assert "training 112.61 G" in visible and "(decoder)" in visible


def test_resolved_config_reads_back_the_same(tmp_path):
    config = load_config("demo", ["data.train=/a b/c:d.csv", "mask.cluster=null", "run.seed=3"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert config.data.train == ["/a b/c:d.csv"] and config.mask.cluster is None


def test_validation_masks_the_papers_share():
    assert round(512 * VALID_MASKED_FRACTION) == 400
    assert load_config("demo", ["mask.num_masked=40"]).valid_num_masked == 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask.num_maskd=3", "unknown key mask.num_maskd; did you mean mask.num_masked?"),
        ("trian.steps=3", "unknown key trian"),
        (
            "deepspeed.zero_optimisation.stage=1",
            "unknown key deepspeed.zero_optimisation; did you mean deepspeed.zero_optimization?",
        ),
        ("mask.num_masked=128", "mask.num_masked: 128 of 128 patches (8x16); at most 127"),
        ("model.decoder_depth=0", "model.decoder_depth: Input should be greater than or equal to 1, not 0"),
        ("model.decoder_width=100", "model.decoder_width: Input should be a multiple of 64, not 100"),
        ("model.encoder_tokens=some", "model.encoder_tokens: Input should be 'all' or 'visible', not 'some'"),
        ("mask.num_masked=0", "mask.num_masked: Input should be greater than or equal to 1, not 0"),
        ("model.input_frames=250", "model.input_frames: 250 is not a multiple of the patch's 16 frames"),
        ("model.num_mel_bins=120", "model.num_mel_bins: 120 is not a multiple of the patch's 16 mel bins"),
        ("model.patch_shape=[16,8]", "256 values"),
        ("model.size=huge", "model.size: Input should be 'tiny', 'small' or 'base', not 'huge'"),
        ("objective.name=both", "objective.name"),
        ("train.steps=many", "train.steps"),
        ("train.warmup_steps=1200", "train.warmup_steps: 1200 of 1200"),
        ("data.mean=1.0", "'auto' goes for both or neither"),
        ("deepspeed.optimizer.type=SGD", "deepspeed.optimizer.type: must be Adam"),
        ("deepspeed.zero_optimization.stage=4", "must be 0, 1, 2 or 3"),
        ("deepspeed.fp16.enabled=true", "bf16"),
        ("run.name=a/b", "must be the name of one folder"),
        ("objective={name: generative, masks: separate}", "belongs to the joint objective"),
        ("data=3", "data"),
        ("noequals", "an override is written key.sub=value"),
        ("run.name=~/x", "must be the name of one folder"),
        ("run.name=~me", "run.name: '~me' would be a folder of that very name"),
        ("run.name=a-$SEED", "run.name: 'a-$SEED' would be a folder of that very name"),
        (f"train.steps={2**31}", "train.steps: must be at most 2147483647, not 2147483648"),
        ("train.steps=1e12", "train.steps: must be at most 2147483647"),
        (f"train.log_every={10**30}", "train.log_every: must be at most 2147483647"),
        (f"mask.cluster=[3, {2**40}]", "mask.cluster: must be at most 2147483647"),
        (f"deepspeed.train_batch_size={2**31}", "deepspeed.train_batch_size: must be at most 2147483647"),
        ("step={on: 2}", "the key on, line 1, is no text: YAML reads it as true or false; quote it"),
        ("run.name.x=1", "run.name is a value, not a section"),
        ("run={name: a, name: b}", "the key name comes twice"),
        ("data.std=.nan", "data.std: Input should be a finite number or 'auto', not nan"),
        ("data.mean=1e999", "data.mean: Input should be a finite number or 'auto', not inf"),
        ("objective.recon_weight=inf", "objective.recon_weight: Input should be a finite number"),
        ("data.weights=[.nan]", "data.weights.0: Input should be a finite number"),
        ("train.steps=true", "train.steps: must be a number, not true"),
        ("deepspeed.optimizer.params.lr=.nan", "deepspeed.optimizer.params.lr: must be a finite number"),
        ("deepspeed.optimizer.params.lr=true", "params.lr: must be a number of at least 0, not True"),
        ("deepspeed.gradient_clipping=.inf", "deepspeed.gradient_clipping: must be a finite number"),
        ("deepspeed.zero_optimization.stage=true", "must be 0, 1, 2 or 3, not True"),
        ("deepspeed.bf16.enabled='false'", "deepspeed.bf16.enabled: must be true or false without quotes"),
        ("deepspeed.bf16.enabled=auto", "deepspeed.bf16.enabled: 'auto' is Hugging Face's word"),
        ("deepspeed.zero_optimization={overlap_comm: 'No'}", "overlap_comm: 'No' is text"),
        ("deepspeed.prescale_gradients=maybe", "prescale_gradients: must be true or false"),
    ],
)
def test_mistakes_are_one_clear_line(override, message):
    with pytest.raises(UserError) as error:
        load_config("demo", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_says_how_large_a_batch_is():
    config = load_config("demo")
    config.deepspeed.pop("train_batch_size", None)
    config.deepspeed.pop("train_micro_batch_size_per_gpu", None)
    with pytest.raises(UserError, match=r"^deepspeed: train_batch_size or .* must be given$"):
        config.batch_sizes(2)


def test_files_that_are_no_config(tmp_path):
    for name, content, message in [
        ("broken.yaml", "run: [", "not valid YAML"),
        ("list.yaml", "- 1", "a config is a mapping"),
        ("binary.yaml", b"\xff\xfe\x00", "not valid YAML"),
        ("circle.yaml", "extends: circle.yaml", "circle"),
        ("child.yaml", "extends: nowhere.yaml", "no such config file"),
        ("empty.yaml", "run: {name: x}", "model is missing"),
    ]:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=message) as error:
            load_config(file)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no such config file, and no preset.*demo"):
        load_config("nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "train: {steps: 40}\ndata: {valid_fraction: 0.3}\ntrain: {valid_every: 7}",
            "train comes twice, lines 2 and 4",
        ),
        ("train:\n  steps: 40\n  warmup_steps: 3\n  steps: 4", "the key train.steps comes twice, lines 3 and 5"),
        ("deepspeed:\n  bf16: {enabled: true, enabled: false}", "deepspeed.bf16.enabled comes twice, line 3"),
        ("step: &s {compile: off}\n'step': *s", "the key step comes twice, lines 2 and 3"),
        ("on: 2", "the key on, line 2, is no text: YAML reads it as true or false; quote it"),
        ("train:\n  2: 3", "the key train.2, line 3, is no text: YAML reads it as int 2; quote it"),
        ("deepspeed: {null: 3}", "the key deepspeed.null, line 2, is no text: YAML reads it as null; quote it"),
        ("data: {std: .inf}", "data.std: Input should be a finite number"),
    ],
)
def test_what_a_file_says_twice_or_beyond_measure(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(f"extends: demo\n{content}\n")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "mine.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_yaml_shares_comes_once(tmp_path):
    """Aliases repeat values, and a merge key is overridden by what stands beside it."""
    (tmp_path / "mine.yaml").write_text(
        "extends: demo\nobjective: {recon_weight: 2.0}\nstep: {<<: {compile: off}, compile: auto}"
    )
    config = load_config(tmp_path / "mine.yaml")
    assert config.objective.recon_weight == 2 and config.step.compile == "auto"


def test_an_override_of_a_section_drops_none_before_it():
    assert load_config("demo", ["train.steps=5000", "train.steps=4000"]).train.steps == 4000
    with pytest.raises(UserError, match=r"replaces the whole section, and with it objective.name=generative"):
        load_config("demo", ["objective.name=generative", "objective={recon_weight: 1}"])


def test_words_that_yaml_reads_as_true_and_false_must_be_quoted(tmp_path):
    (tmp_path / "words.yaml").write_text("extends: custom\nrun: {name: y}\ntask: {labels: [yes, no, on, off]}\n")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "words.yaml", (), FinetuneConfig)
    assert str(error.value).count("quote yes, no, on, off") == 1
    (tmp_path / "words.yaml").write_text("extends: custom\nrun: {name: y}\ntask: {labels: ['yes', 'no']}\n")
    assert load_config(tmp_path / "words.yaml", (), FinetuneConfig).task.labels == ["yes", "no"]


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("AUDIO", "/audio")
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "mine.yaml").write_text(
        "extends: demo\nrun: {folder: $HOME/runs}\ndata: {train: [~/a, '${AUDIO}/b', c]}"
    )
    settings = ["data.valid=~/v", "data.cache_dir=$AUDIO/c", "model.init_from=~/x.pth"]
    config = load_config(tmp_path / "mine.yaml", settings)
    assert config.run.folder == "/home/me/runs" and config.data.train == ["/home/me/a", "/audio/b", "c"]
    assert (*config.data.valid, config.data.cache_dir) == ("/home/me/v", "/audio/c")
    assert config.model.init_from == "/home/me/x.pth"
    with pytest.raises(UserError, match=r"run.folder: \$NOWHERE/x: the environment variable NOWHERE is not set"):
        load_config("demo", ["run.folder=$NOWHERE/x"])
    (tmp_path / "$NOWHERE").mkdir()
    assert load_config("demo", ["data.train=$NOWHERE"]).data.train == ["$NOWHERE"]


def test_numbers_may_be_written_without_a_dot(tmp_path):
    (tmp_path / "c.yaml").write_text("extends: demo\ndeepspeed: {optimizer: {params: {weight_decay: 5e-7}}}")
    params = load_config(tmp_path / "c.yaml", ["deepspeed.optimizer.params.lr=1e-4"]).deepspeed["optimizer"]["params"]
    assert params["lr"] == 1e-4 and params["weight_decay"] == 5e-7
    with pytest.raises(UserError, match=r"params.lr: must be a number of at least 0, not 'fast'"):
        load_config("demo", ["deepspeed.optimizer.params.lr=fast"])


def test_extends_merges_section_by_section(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"extends": "demo", "run": {"name": "mine"}, "train": {"steps": 1234}})
    )
    mine, demo = load_config(tmp_path / "mine.yaml"), load_config("demo")
    assert [key for key, _, _ in differences(demo.model_dump(mode="json"), mine.model_dump(mode="json"))] == [
        "run.name",
        "train.steps",
    ]


def test_flops_by_hand():
    """Base, 400 masked, product by product; the published 97.3 GFLOP of a ViT-B at 514 tokens are projection and
    blocks.
    """
    flops = flops_per_clip(load_config("ssast-base-patch-400").architecture, 400)
    tokens, width = 514, 768
    qkv, scores, values, proj = (
        tokens * width * 3 * width,
        tokens * tokens * width,
        tokens * tokens * width,
        tokens * width * width,
    )
    mlp = 2 * tokens * width * 4 * width
    assert flops.blocks == 2 * 12 * (qkv + scores + values + proj + mlp)
    assert flops.projection == 2 * 512 * 256 * width
    assert flops.heads == 2 * 2 * 400 * (width * width + width * 256)
    assert flops.info_nce == 2 * 400 * 400 * 256
    assert (flops.blocks + flops.projection) / 1e9 == pytest.approx(97.3, abs=0.1)
    assert flops.train / 1e12 == pytest.approx(0.296, abs=0.001)
    two_passes = flops_per_clip(load_config("ssast-base-patch-400").architecture, 400, passes=2)
    assert two_passes.blocks == 2 * flops.blocks and two_passes.heads == flops.heads


def test_flops_agree_with_a_counter():
    """Against PyTorch's own count of the products that a forward pass of the tiny demo model runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = load_config("demo")
    model = build_model(config.architecture)
    mask = torch.arange(100).expand(2, -1)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.pretrain(torch.randn(2, 256, 128), mask)
    assert counter.get_total_flops() / 2 == pytest.approx(flops_per_clip(config.architecture, 100).forward, rel=1e-6)


def test_dry_run_tells_what_it_costs():
    text = describe_run(load_config("ssast-base-patch-400", ["data.train=/audio"]))
    assert "parameters      87," in text.replace("\u00a0", " ")
    assert "514 (8x64 patches + 2), 400 masked" in text and "24 N D^2" in text and "GiB" in text
    assert yaml.safe_load(text.split("\n\n")[0])["data"]["train"] == ["/audio"]
