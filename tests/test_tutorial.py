"""Each stage of the video runs, has the parameters that it is counted with, sees no future, and its last is the GPT."""

import pytest
import torch

from model.gpt import GPT
from model.ladder import published_model
from model.size import STAGES, ModelConfig, SizeError, count_params, resolve_model
from model.tutorial import AttentionModel, Head, VideoBlock, build_model

SHAPE = {"n_layer": 3, "n_head": 4, "d_model": 32, "vocab_size": 65, "seq_len": 8}


def stage_config(stage: str | None, **options: object) -> ModelConfig:
    return resolve_model("video", **{**SHAPE, "stage": stage, **options})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shape", [{}, {"d_model": 24, "n_head": 2, "n_layer": 2}])
def test_every_stage_has_the_parameters_that_are_counted(stage: str, shape: dict[str, object]) -> None:
    config = stage_config(stage, **shape)
    model = build_model(config)
    params = count_params(config)
    assert sum(p.numel() for p in model.parameters()) == params.n_params
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linear == params.n_params_matmul


def test_the_stages_have_the_videos_sizes() -> None:
    """4,225 is 65 squared; the last stage at the large setting is the published model."""
    assert count_params(stage_config("bigram")).n_params == 65**2
    large = stage_config("layer_norm", n_layer=6, n_head=6, d_model=384, seq_len=256)
    assert count_params(large).n_params == count_params(published_model("video-10M")).n_params == 10_788_929


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_writes_and_learns(stage: str) -> None:
    torch.manual_seed(0)
    model = build_model(stage_config(stage))
    written = model.generate(torch.zeros((2, 1), dtype=torch.long), 12, generator=torch.Generator().manual_seed(0))
    assert written.shape == (2, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 65, (16, 9))
    losses = []
    for _ in range(60):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_sees_the_future(stage: str) -> None:
    model = build_model(stage_config(stage)).eval()
    ids = torch.randint(0, 65, (1, 8), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 65
    before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_all_but_the_bigram_look_back() -> None:
    ids = torch.randint(0, 65, (1, 8), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 65
    for stage in STAGES:
        model = build_model(stage_config(stage)).eval()
        same = torch.allclose(model(ids)[0][:, -1], model(changed)[0][:, -1])
        assert same == (stage == "bigram"), stage


def test_the_gpts_fused_attention_equals_the_videos_heads() -> None:
    """The same matrices in both: four plain heads with an explicit mask, and one packed product with a fused kernel."""
    gpt = GPT(resolve_model("video", **SHAPE))
    block = VideoBlock(stage_config("layer_norm"))
    ours, video = gpt.blocks[0].attention, block.attention
    with torch.no_grad():
        ours.qkv.weight.normal_(std=0.3)
        for index, head in enumerate(video.heads):
            assert isinstance(head, Head)
            for part, layer in zip(ours.qkv.weight.split(32), (head.query, head.key, head.value), strict=True):
                layer.weight.copy_(part[index * 8 : (index + 1) * 8])
        video.proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours(x), video(x))


def test_one_model_has_one_id_whatever_shape_the_file_gives_an_early_stage() -> None:
    assert stage_config("bigram") == stage_config("bigram", n_layer=1, n_head=2, d_model=64)
    assert stage_config("head") == stage_config("head", n_layer=2, n_head=1)
    assert stage_config("blocks") != stage_config("blocks", n_layer=2)
    assert build_model(stage_config("blocks")).predict.__func__ is AttentionModel.predict
    assert isinstance(build_model(stage_config(None)), GPT)


def test_mup_does_not_apply_to_a_stage() -> None:
    with pytest.raises(SizeError, match="does not apply to stage='head'"):
        stage_config("head", parametrization="mup", base_d_model=32)
