"""Tokens are drawn as asked, and remembering keys and values changes none of them."""

import time

import pytest
import torch

from model.generate import Draw, draw_token, iter_tokens
from model.gpt import GPT
from model.size import PRESETS, resolve_model
from model.tutorial import build_model

SHAPE = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 13, "seq_len": 12}
LOGITS = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]))


def draw_many(draw: Draw) -> list[float]:
    drawn = draw_token(LOGITS.expand(20_000, -1), draw, torch.Generator().manual_seed(0)).flatten()
    return [(drawn == token).float().mean().item() for token in range(5)]


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (Draw(), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Draw(temperature=0.0), [1, 0, 0, 0, 0]),
        (Draw(top_k=2), [5 / 7, 2 / 7, 0, 0, 0]),
        (Draw(top_p=0.6), [5 / 7, 2 / 7, 0, 0, 0]),  # the smallest set that holds 0.6
        (Draw(top_p=0.4), [1, 0, 0, 0, 0]),
        (Draw(top_p=0.0), [1, 0, 0, 0, 0]),
        (Draw(temperature=1e-40), [1, 0, 0, 0, 0]),
        (Draw(top_p=1.0, top_k=99), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Draw(temperature=0.5), [x**2 / 0.325 for x in (0.5, 0.2, 0.15, 0.1, 0.05)]),
    ],
)
def test_frequencies_are_those_asked_for(draw: Draw, expected: list[float]) -> None:
    assert draw_many(draw) == pytest.approx(expected, abs=0.015)


def test_top_p_looks_at_the_tempered_distribution() -> None:
    """At temperature 0.5 the likeliest token alone holds 0.77, so top_p 0.6 leaves it alone; untempered it would leave two."""
    assert draw_many(Draw(temperature=0.5, top_p=0.6)) == pytest.approx([1, 0, 0, 0, 0])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("n_prompt", [1, 7, 15])
def test_remembering_draws_the_same_tokens_also_beyond_the_context(preset: str, n_prompt: int) -> None:
    torch.manual_seed(0)
    model = GPT(resolve_model(preset, **SHAPE, init_std=0.3)).eval()
    prompt = torch.randint(0, 13, (3, n_prompt))
    drawn = [
        model.generate(prompt, 20, top_p=0.9, generator=torch.Generator().manual_seed(5), use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (3, n_prompt + 20)
    assert len({tuple(row.tolist()) for row in drawn[0]}) == 3


def test_remembering_computes_one_position_a_token() -> None:
    model = GPT(resolve_model("nanogpt", **SHAPE)).eval()
    widths = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    model.generate(torch.zeros((1, 4), dtype=torch.long), 10)
    assert widths == [4, 1, 1, 1, 1, 1, 1, 1, 1, 12], "the context of 12 is full at the last token"


@pytest.mark.parametrize("use_cache", [True, False])
def test_beyond_the_context_a_token_follows_from_the_last_ones_alone(use_cache: bool) -> None:
    torch.manual_seed(1)
    model = GPT(resolve_model("nanogpt", **SHAPE, init_std=0.5)).eval()
    prompt = torch.randint(0, 13, (4, 15))
    text = model.generate(prompt, 20, temperature=0.0, use_cache=use_cache)
    assert torch.equal(text[:, :15], prompt)
    for end in range(15, 35):
        assert torch.equal(text[:, end], model(text[:, end - 12 : end])[0][:, -1].argmax(-1))


def test_a_stage_of_the_video_writes_by_the_same_function() -> None:
    model = build_model(resolve_model("video", **SHAPE, stage="head"))
    columns = list(iter_tokens(model, torch.zeros((2, 1), dtype=torch.long), 5, Draw()))
    assert [column.shape for column in columns] == [(2, 1)] * 5
    assert not columns[0].requires_grad


@pytest.mark.slow
def test_the_large_model_writes_at_least_five_times_as_fast_as_the_video() -> None:
    """255 tokens from one, so that the context of 256 is just filled; CPU seconds of one thread, in turn."""
    shape = {"n_layer": 6, "n_head": 6, "d_model": 384, "vocab_size": 65, "seq_len": 256}
    ours = build_model(resolve_model("nanogpt", **shape)).eval()
    video = build_model(resolve_model("video", **shape, stage="layer_norm")).eval()
    n_threads, prompt, ratios = torch.get_num_threads(), torch.zeros((1, 1), dtype=torch.long), []
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            seconds = []
            for model in (ours, video):
                started = time.process_time()
                model.generate(prompt, 255)
                seconds.append(time.process_time() - started)
            print(f"tokens/s: {255 / seconds[0]:.0f} remembering, {255 / seconds[1]:.0f} as the video does")
            ratios.append(seconds[1] / seconds[0])
    finally:
        torch.set_num_threads(n_threads)
    assert sorted(ratios)[1] > 5
