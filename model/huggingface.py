"""Weights to and from Hugging Face: GPT-2 both ways, `modern` as Qwen3; what has no equal there is refused, with the reason.

No transformers here: a folder with config.json and model.safetensors is all that it reads.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.attention import DEFAULT_ROPE_THETA, RMS_EPS
from model.gpt import GPT
from model.size import ModelConfig, SizeError, resolve_model
from model.tutorial import Bigram

GPT2_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
# Ours to theirs, inside a block; theirs keeps matrices as (in, out) where ours are (out, in).
GPT2_BLOCK = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
LAYER_NORM_EPS = 1e-5  # torch's default, and GPT-2's


def find_refusal(config: ModelConfig) -> str | None:
    """Say why a model has no equal among Hugging Face's GPT-2 and Qwen3; None where it has."""
    if config.stage is not None:
        return f"stage={config.stage!r}, is a step of the video and no published architecture"
    if config.parametrization is not None:
        return "parametrization='mup', multiplies logits and residuals by factors that neither architecture has"
    if config.head_bias:
        return "head_bias=True, neither architecture has a bias in its head"
    return find_qwen3_refusal(config) if config.positions == "rotary" else find_gpt2_refusal(config)


def find_gpt2_refusal(config: ModelConfig) -> str | None:
    """Say why a model with learned positions is no GPT-2."""
    needs = {"norm": "layernorm", "qk_norm": None, "n_kv_head": None}
    wrong = [key for key, value in needs.items() if getattr(config, key) != value]
    if wrong:
        return f"{wrong[0]}={getattr(config, wrong[0])!r}, GPT-2 (learned positions) has {needs[wrong[0]]!r}"
    if config.activation not in GPT2_ACTIVATIONS:
        return f"activation={config.activation!r}, GPT-2 (learned positions) has {', '.join(GPT2_ACTIVATIONS)}"
    return None


def find_qwen3_refusal(config: ModelConfig) -> str | None:
    """Say why a model with rotary positions is no Qwen3."""
    needs = {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "bias": False, "qkv_bias": False}
    wrong = [key for key, value in needs.items() if getattr(config, key) != value]
    return f"{wrong[0]}={getattr(config, wrong[0])!r}, Qwen3 (rotary positions) has {needs[wrong[0]]!r}" if wrong else None


def export_model(model: GPT | Bigram, folder: Path) -> str:
    """Write config.json and model.safetensors, as AutoModelForCausalLM reads them; return the architecture's name.

    Raises:
        SizeError: the model has no equal there; the message says why.
    """
    refusal = find_refusal(model.config)
    if refusal is not None:
        raise SizeError(f"export: {refusal}; only gpt2-like, nanogpt-like and modern-like models can be exported")
    is_qwen3 = model.config.positions == "rotary"
    described = describe_qwen3(model.config) if is_qwen3 else describe_gpt2(model.config)
    tensors = convert_to_qwen3(model) if is_qwen3 else convert_to_gpt2(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().clone().contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    return str(described["architectures"][0])


def describe_gpt2(config: ModelConfig) -> dict[str, Any]:
    """Return GPT-2's config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.d_mlp,
        "activation_function": GPT2_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    }


def convert_to_gpt2(model: GPT | Bigram) -> dict[str, Tensor]:
    """Return the weights under GPT-2's names; a bias that we do not have is zero there, which changes nothing."""
    state, config = model.state_dict(), model.config
    tensors = {
        "transformer.wte.weight": state["token_embedding.weight"][: config.vocab_size],
        "transformer.wpe.weight": state["position_embedding.weight"],
    }
    names = {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for i in range(config.n_layer) for ours, theirs in GPT2_BLOCK.items()}
    for ours, theirs in [*names.items(), ("norm", "ln_f")]:
        weight = state[f"{ours}.weight"]
        tensors[f"transformer.{theirs}.weight"] = weight.T if weight.dim() == 2 else weight
        tensors[f"transformer.{theirs}.bias"] = state.get(f"{ours}.bias", torch.zeros(weight.shape[0]))
    if not config.tied:
        tensors["lm_head.weight"] = state["head.weight"][: config.vocab_size]
    return tensors


def describe_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Return Qwen3's config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.seq_len,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "head_dim": config.d_head,
        "intermediate_size": config.d_mlp,
        "hidden_act": "silu",
        "rms_norm_eps": RMS_EPS,
        "rope_theta": config.rope_theta or DEFAULT_ROPE_THETA,
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    }


def convert_to_qwen3(model: GPT | Bigram) -> dict[str, Tensor]:
    """Return the weights under Qwen3's names, packed matrices split."""
    state, config = model.state_dict(), model.config
    tensors = {
        "model.embed_tokens.weight": state["token_embedding.weight"][: config.vocab_size],
        "model.norm.weight": state["norm.weight"],
    }
    for index in range(config.n_layer):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        q, k, v = state[f"{ours}.attention.qkv.weight"].split([config.d_model, config.d_kv, config.d_kv])
        gate, up = state[f"{ours}.mlp.up.weight"].chunk(2)
        block = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": state[f"{ours}.attention.proj.weight"],
            "self_attn.q_norm": state[f"{ours}.attention.q_norm.weight"],
            "self_attn.k_norm": state[f"{ours}.attention.k_norm.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": state[f"{ours}.mlp.down.weight"],
            "input_layernorm": state[f"{ours}.norm_1.weight"],
            "post_attention_layernorm": state[f"{ours}.norm_2.weight"],
        }
        tensors |= {f"{theirs}.{name}.weight": tensor for name, tensor in block.items()}
    if not config.tied:
        tensors["lm_head.weight"] = state["head.weight"][: config.vocab_size]
    return tensors


def import_gpt2(folder: Path) -> GPT:
    """Build the GPT of a GPT-2 folder in Hugging Face format.

    Raises:
        SizeError: it is another architecture, or an option that we do not have.
    """
    facts = json.loads((folder / "config.json").read_text())
    activations = {theirs: ours for ours, theirs in GPT2_ACTIVATIONS.items()}
    activation = facts.get("activation_function", "gelu_new")
    if facts.get("model_type") != "gpt2" or activation not in activations:
        raise SizeError(
            f"{folder}: model_type={facts.get('model_type')!r} with {activation!r}, is not a GPT-2; give a GPT-2 folder"
        )
    model = GPT(
        resolve_model(
            "gpt2",
            n_layer=facts["n_layer"],
            n_head=facts["n_head"],
            d_model=facts["n_embd"],
            d_ff=facts.get("n_inner"),
            vocab_size=facts["vocab_size"],
            seq_len=facts["n_positions"],
            activation=activations[activation],
            tied=facts.get("tie_word_embeddings", True),
        )
    )
    load_weights(model, folder / "model.safetensors")
    return model


def load_weights(model: GPT | Bigram, path: Path) -> None:
    """Fill a model from a file of ours or of GPT-2's; a shorter context takes the first positions.

    Raises:
        SizeError: a tensor is missing or has another shape.
    """
    tensors = load_file(path)
    if any(name.removeprefix("transformer.").startswith("wte.") for name in tensors):
        tensors = convert_from_gpt2(model, tensors)
    tensors = {name: fit_rows(model, name, tensor) for name, tensor in tensors.items()}
    expected = model.state_dict()
    tied = {"head.weight", "token_embedding.weight"} if model.config.tied else set()
    for name, tensor in expected.items():
        found = tensors.get(name)
        if found is None and name in tied:  # safetensors keeps one of two names for shared weights
            found = tensors[name] = next(tensors[other] for other in tied if other in tensors)
        if found is None or found.shape != tensor.shape:
            shape = None if found is None else tuple(found.shape)
            raise SizeError(
                f"{path}: {name} has shape {shape}, the model needs {tuple(tensor.shape)}; use the preset, shape and vocabulary "
                "that the weights were trained with"
            )
    model.load_state_dict({name: tensors[name] for name in expected})


def fit_rows(model: GPT | Bigram, name: str, tensor: Tensor) -> Tensor:
    """Cut positions that a shorter context does not use, and add zero rows where the vocabulary is padded."""
    config = model.config
    if name == "position_embedding.weight":
        return tensor[: config.seq_len]
    if name in ("token_embedding.weight", "head.weight", "head.bias") and len(tensor) == config.vocab_size < config.n_vocab_rows:
        return torch.cat([tensor, tensor.new_zeros(config.n_vocab_rows - config.vocab_size, *tensor.shape[1:])])
    return tensor


def convert_from_gpt2(model: GPT | Bigram, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return GPT-2's weights under our names; biases that the model does not have must be zero.

    Raises:
        SizeError: a bias that is not zero has no place in the model.
    """
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    ours = {"token_embedding.weight": theirs["wte.weight"], "position_embedding.weight": theirs["wpe.weight"]}
    ours["head.weight"] = theirs.get("lm_head.weight", theirs["wte.weight"])
    n_layer = model.config.n_layer
    names = {f"h.{i}.{b}": f"blocks.{i}.{a}" for i in range(n_layer) for a, b in GPT2_BLOCK.items()} | {"ln_f": "norm"}
    wanted = model.state_dict()
    for their_name, our_name in names.items():
        for part in ("weight", "bias"):
            tensor = theirs.get(f"{their_name}.{part}")
            if tensor is None:
                continue
            if f"{our_name}.{part}" not in wanted:
                if tensor.any():
                    raise SizeError(f"{their_name}.bias, is not zero and the model has no such bias; set model.preset = 'gpt2'")
                continue
            ours[f"{our_name}.{part}"] = tensor.T if tensor.dim() == 2 else tensor
    return ours
