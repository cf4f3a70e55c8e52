"""The loss in chunks is the plain loss, in value and gradients, and never holds the logits of the batch."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import gpt, head
from model.gpt import GPT
from model.size import resolve_model

VOCAB = 500


def build(**options: object) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": VOCAB, "seq_len": 8, "init_std": 0.2}
    return GPT(resolve_model("nanogpt", **{**shape, **options}))


def draw_ids() -> Tensor:
    return torch.randint(0, VOCAB, (5, 8), generator=torch.Generator().manual_seed(0))


def measure(model: GPT, ids: Tensor) -> tuple[float, list[Tensor]]:
    """Return loss and gradients; the loss is scaled, as it is where gradients are accumulated."""
    model.zero_grad()
    loss = model(ids, ids)[1]
    assert loss is not None
    (loss / 4).backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest tensor has that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return out


MUP = {"parametrization": "mup", "base_d_model": 4}
OPTIONS = [{}, {"tied": False, "head_bias": True, "padded_vocab_size": 512}, MUP]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_logits", [1, 7_000, 10**9])
def test_the_loss_in_chunks_has_the_same_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], chunk_logits: int
) -> None:
    model, ids = build(**options), draw_ids()
    plain, plain_grads = measure(model, ids)
    monkeypatch.setattr(gpt, "LARGE_VOCAB", VOCAB)
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk_logits)
    chunked, chunked_grads = measure(model, ids)
    assert chunked == pytest.approx(plain, rel=1e-6)
    for one, other in zip(plain_grads, chunked_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_is_right_in_double_precision() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in ((6, 3), (11, 3), (11,)))
    targets = torch.randint(0, 11, (6,), generator=draw)
    plain = F.cross_entropy(1.5 * F.linear(x, weight, bias), targets)
    chunked = head.score_in_chunks(x, weight, bias, targets, scale=1.5, chunk_logits=22)
    grads = [torch.autograd.grad(loss, (x, weight, bias)) for loss in (plain, chunked)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # the sums in between are float32


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(), draw_ids()
    exact, exact_grads = measure(model, ids)
    errors = []
    for large_vocab in (10**9, VOCAB):
        monkeypatch.setattr(gpt, "LARGE_VOCAB", large_vocab)
        with torch.autocast("cpu", torch.bfloat16):
            loss, grads = measure(model, ids)
        distance = sum((a - b).norm() for a, b in zip(grads, exact_grads, strict=True))
        errors.append((abs(loss - exact), float(distance)))
    (plain_loss, plain_grad), (chunked_loss, chunked_grad) = errors
    assert chunked_loss <= plain_loss + 1e-3
    assert chunked_grad <= 1.1 * plain_grad


def test_a_loss_beyond_what_a_probability_can_hold_stays_finite() -> None:
    x, weight = torch.tensor([[1.0]]), torch.tensor([[200.0], [0.0]])
    assert head.score_in_chunks(x, weight, None, torch.tensor([1])).item() == pytest.approx(200.0)


def test_it_never_holds_the_logits_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(), draw_ids()
    largest = []
    for large_vocab in (10**9, VOCAB):
        monkeypatch.setattr(gpt, "LARGE_VOCAB", large_vocab)
        monkeypatch.setattr(head, "CHUNK_LOGITS", 4 * VOCAB)
        with LargestTensor() as watch:
            measure(model, ids)
        largest.append(watch.largest)
    weight = VOCAB * 16
    assert largest == [ids.numel() * VOCAB, weight]


def test_without_gradients_it_is_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(), draw_ids()
    monkeypatch.setattr(gpt, "LARGE_VOCAB", VOCAB)
    trained, _ = measure(model, ids)
    with torch.no_grad():
        assert model(ids, ids)[1].item() == trained


MEASURE_PEAK = """
import sys, torch
from model import gpt, head
from model.size import resolve_model
torch.manual_seed(0)
gpt.LARGE_VOCAB, head.CHUNK_LOGITS = int(sys.argv[1]), 2**23
model = gpt.GPT(resolve_model("gpt2", n_layer=1, n_head=2, d_model=64, vocab_size=50_257, seq_len=256))
ids = torch.randint(0, 50_257, (8, 256))
def read_peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
model(ids[:1, :8], ids[:1, :8])[1].backward()  # what torch loads when it is first used
before = read_peak()
loss = model(ids, ids)[1]
loss.backward()
print((read_peak() - before) // 1024, loss.item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_at_gpt2s_vocabulary_it_takes_a_fraction_of_the_memory() -> None:
    """8 x 256 positions: their logits in float32 are 393 MiB, a chunk's 32. Each way in a process of its own, by its peak."""
    found = []
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }  # glibc gives large blocks back at once: the peak is the need
    for large_vocab in ("1000000", "16384"):
        command = [sys.executable, "-c", MEASURE_PEAK, large_vocab]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.append([float(number) for number in done.stdout.split()])
    (plain, plain_loss), (chunked, chunked_loss) = found
    print(f"peak above the model: plain {plain:.0f} MiB, in chunks {chunked:.0f} MiB")
    assert chunked_loss == pytest.approx(plain_loss, rel=1e-5)
    assert plain > 2 * 393
    assert chunked < plain / 6
