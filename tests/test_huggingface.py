"""Our logits are those of `transformers` for the same weights, both ways, and what has no equal there is refused."""

from pathlib import Path

import pytest
import torch
import transformers

from model.gpt import GPT
from model.huggingface import export_model, import_gpt2, load_weights
from model.size import SizeError, resolve_model
from model.tutorial import build_model

SHAPE = {"n_layer": 3, "n_head": 4, "d_model": 32, "vocab_size": 61, "seq_len": 24}
IDS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(3))


def draw_large(model: torch.nn.Module) -> None:
    """Give every tensor, biases and gains among them, a value of its own: a swapped or transposed one shows."""
    with torch.no_grad():
        for index, parameter in enumerate(p for _, p in sorted(model.named_parameters())):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.copy_((1.0 if parameter.dim() < 2 else 0.0) + 0.2 * noise)


def read_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_of_transformers_gives_our_logits(tmp_path: Path, activation: str, tied: bool) -> None:
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4, activation_function=activation, tie_word_embeddings=tied
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    draw_large(theirs)
    theirs.save_pretrained(tmp_path)
    ours = import_gpt2(tmp_path).eval()
    with torch.no_grad():
        expected, found = theirs(IDS).logits, ours(IDS)[0]
    assert expected.std() > 0.5
    assert (expected - found).abs().max().item() < 1e-4


@pytest.mark.parametrize(
    ("preset", "options", "architecture"),
    [
        ("gpt2", {}, "GPT2LMHeadModel"),
        ("gpt2", {"d_ff": 40, "tied": False}, "GPT2LMHeadModel"),
        ("nanogpt", {}, "GPT2LMHeadModel"),
        ("nanogpt", {"padded_vocab_size": 64}, "GPT2LMHeadModel"),
        ("modern", {}, "Qwen3ForCausalLM"),
        ("modern", {"n_kv_head": 2, "rope_theta": 5e5, "tied": True}, "Qwen3ForCausalLM"),
    ],
)
def test_an_exported_model_is_the_same_model_there(
    tmp_path: Path, preset: str, options: dict[str, object], architecture: str
) -> None:
    model = GPT(resolve_model(preset, **SHAPE, **options)).eval()
    draw_large(model)
    assert export_model(model, tmp_path) == architecture
    with torch.no_grad():
        assert (read_logits(tmp_path) - model(IDS)[0]).abs().max().item() < 1e-4


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"padded_vocab_size": 64}, {"seq_len": 16}])
def test_an_exported_gpt2_comes_back(tmp_path: Path, options: dict[str, object]) -> None:
    model = GPT(resolve_model("gpt2", **SHAPE, tied=bool(options.get("tied", True)))).eval()
    draw_large(model)
    export_model(model, tmp_path)
    back = GPT(resolve_model("gpt2", **{**SHAPE, **options})).eval()
    load_weights(back, tmp_path / "model.safetensors")
    torch.testing.assert_close(back(IDS[:, :16])[0], model(IDS[:, :16])[0])
    if not options:
        for (name, one), other in zip(model.named_parameters(), import_gpt2(tmp_path).parameters(), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("preset", "options", "reason"),
    [
        ("video", {}, "head_bias=True"),
        ("video", {"stage": "head", "head_bias": False}, "stage='head'"),
        ("nanogpt", {"qk_norm": True}, "qk_norm=True"),
        ("nanogpt", {"n_kv_head": 2}, "n_kv_head=2"),
        ("nanogpt", {"activation": "swiglu"}, "activation='swiglu'"),
        ("nanogpt", {"positions": "rotary"}, "norm='layernorm', Qwen3"),
        ("modern", {"positions": "learned"}, "norm='rmsnorm', GPT-2"),
        ("modern", {"qkv_bias": True}, "qkv_bias=True"),
        ("nanogpt", {"parametrization": "mup", "base_d_model": 16}, "parametrization='mup'"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_reason(
    tmp_path: Path, preset: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(SizeError, match=reason):
        export_model(build_model(resolve_model(preset, **{**SHAPE, **options})), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    model = GPT(resolve_model("gpt2", **SHAPE))
    draw_large(model)
    export_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.raises(SizeError, match=r"token_embedding\.weight has shape \(61, 32\), the model needs \(62, 32\)"):
        load_weights(GPT(resolve_model("gpt2", **{**SHAPE, "vocab_size": 62})), path)
    with pytest.raises(SizeError, match=r"bias, is not zero"):
        load_weights(GPT(resolve_model("nanogpt", **SHAPE)), path)
