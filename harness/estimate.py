"""What a step needs: memory of a rank by component, seconds of arithmetic and of communication. No torch.

Memory is counted tensor by tensor for this project's model and engines, and held to measurement by tests. Time is a roofline of
three constants, held to published throughputs in BENCHMARKS.md; where more is at stake, `harness plan --probe` measures.
"""

from dataclasses import dataclass, replace

from harness.accelerators import Accelerator
from harness.zero import BUCKET_ELEMENTS
from model.size import ModelConfig, count_flops, count_params

PERSISTENT_ELEMENTS = 100_000  # stage 3 keeps smaller parameters whole: DeepSpeed's default
MAX_LIVE_PARAMETERS = 1_000_000_000  # stage 3 holds up to so many gathered: DeepSpeed's default
LARGE_VOCAB, CHUNK_LOGITS = 16_384, 2**25  # model/head.py: from where on, and how many logits are held at a time
USABLE_MEMORY = 0.92  # the rest: the CUDA context, cuBLAS workspaces, fragments
PRODUCT_EFFICIENCY = 0.7  # of the peak that large matrix products reach
PASSES_COMPILED, PASSES_EAGER = 3.0, 5.0  # times that stored activations cross the memory, forward and backward together
CALLS_PER_LAYER, CALL_S = 50, 5e-6  # aten calls of a layer, forward and backward, and what starting one takes
OPTIMIZER_BYTES = 28  # AdamW reads weight, gradient and two moments and writes three of them, in fp32
BACKWARD = 2 / 3  # of a micro-step's arithmetic; DDP hides communication behind it


@dataclass(frozen=True)
class Setting:
    """How one rank trains: what decides memory and time besides the model."""

    precision: str  # fp32 | bf16_autocast | bf16_native
    micro_batch_size: int
    n_micro_steps: int = 1
    kind: str = "torch"  # torch (alone or DDP) | deepspeed
    zero_stage: int = 0
    world_size: int = 1
    on_cuda: bool = True
    compile: bool = False
    activation_checkpointing: bool = False
    offload_optimizer: bool = False

    @property
    def stage(self) -> int:
        """The ZeRO stage; the torch engine splits nothing."""
        return self.zero_stage if self.kind == "deepspeed" else 0


@dataclass(frozen=True)
class Memory:
    """Memory of one rank. Units: bytes.

    `gradients` are those that are there after the backward pass; `buffers` what is there at the worst moment besides.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def state(self) -> float:
        """Weights, gradients and optimiser state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The worst moment. Gradients of a first micro-step only appear as activations go, so the two do not add up."""
        kept = self.weights + self.optimizer + self.buffers
        return kept + max(self.gradients, self.activations + self.logits)


def estimate_memory(model: ModelConfig, setting: Setting) -> Memory:
    """Return what one rank needs, by component."""
    weights, gradients, optimizer = count_state(model, setting)
    tokens = setting.micro_batch_size * model.seq_len
    memory = Memory(
        weights=weights,
        gradients=gradients,
        optimizer=0.0 if setting.offload_optimizer else optimizer,
        activations=tokens * count_activation_bytes(model, setting),
        logits=count_logit_bytes(model, setting, tokens),
        buffers=count_buffers(model, setting),
    )
    if setting.n_micro_steps > 1:  # gradients of earlier micro-steps are there while activations are
        whole = 4.0 * count_params(model).n_params if setting.stage <= 1 and setting.precision != "bf16_native" else gradients
        memory = replace(memory, buffers=memory.buffers + min(whole, memory.activations + memory.logits))
    return memory


def count_state(model: ModelConfig, setting: Setting) -> tuple[float, float, float]:
    """Return bytes of weights, gradients and optimiser state on one rank.

    Source: Rajbhandari et al. 2020 (ZeRO), section 3.1, with what DeepSpeed 0.19.8 adds to it here: fp32 gradient accumulation,
    a second fp32 copy of split weights in fp32 and autocast, whole small parameters at stage 3; each measured.
    """
    n, ranks, stage = count_params(model).n_params, setting.world_size, setting.stage
    if setting.precision == "bf16_native":
        gradients = {1: 2 + 4.0, 2: 4 / ranks, 3: 4 / ranks}.get(stage, 6.0)  # stage 1 keeps bf16 and fp32 ones
        weights, optimizer = (2 / ranks if stage == 3 else 2.0), 12 / ranks
    else:
        weights = 4 / ranks if stage == 3 else 4.0
        gradients = 4 / ranks if stage else 4.0
        optimizer = 12 / ranks if stage else 8.0
    whole = count_persistent(model) * (2 if setting.precision == "bf16_native" else 4) if stage == 3 else 0
    return weights * n + whole, gradients * n, optimizer * n


def count_persistent(model: ModelConfig) -> int:
    """Count the parameters that stage 3 keeps whole: those of small tensors."""
    d, small = model.d_model, PERSISTENT_ELEMENTS
    n_up = 2 if model.activation == "swiglu" else 1
    layer = (d * d, d * (d + 2 * model.d_kv), n_up * d * model.d_mlp, d * model.d_mlp)
    rows = d * model.n_vocab_rows
    ends = (rows, 0 if model.tied else rows, model.seq_len * d if model.positions == "learned" else 0)
    params = count_params(model)
    vectors = params.n_params - model.n_layer * sum(layer) - sum(ends)
    matrices = model.n_layer * sum(size for size in layer if size < small) + sum(size for size in ends if size < small)
    return matrices + vectors


def count_activation_bytes(model: ModelConfig, setting: Setting) -> float:
    """Return the bytes that a token leaves for the backward pass, logits not among them."""
    residual = 2 if setting.precision == "bf16_native" else 4
    layer = count_layer_bytes(model, setting)
    ends = model.d_model * (2 * residual + (4 if setting.precision == "fp32" else 2))  # embedding's output, last norm's
    if setting.activation_checkpointing:  # each layer keeps its input, and one layer at a time the rest
        return model.n_layer * model.d_model * residual + layer + ends
    return model.n_layer * layer + ends


def count_layer_bytes(model: ModelConfig, setting: Setting) -> float:
    """Return the bytes that a token leaves in one layer, tensor by tensor.

    Note: norms keep their input, products theirs, attention q, k, v and its output; residual sums keep nothing.
    """
    d, d_kv, d_mlp = model.d_model, model.d_kv, model.d_mlp
    number, residual = (4 if setting.precision == "fp32" else 2), (2 if setting.precision == "bf16_native" else 4)
    norms = 2 * d * (residual + number)
    is_moved, is_shared = model.qk_norm or model.positions == "rotary", d_kv < d
    attention = number * d + 4 * model.n_head  # the output, and the log-sum-exp
    attention += 0 if is_moved and is_shared else number * (d + 2 * d_kv)  # q, k, v as they came
    attention += number * (2 * d if is_shared else 0)  # keys and values repeated for their queries
    attention += number * (d + (0 if is_shared else d_kv)) if is_moved else 0  # queries and keys turned
    attention += 4 * (d + d_kv) if model.qk_norm else 0
    if not setting.on_cuda and setting.precision != "fp32":  # matrix products with explicit weights, and a copy of the output
        attention += number * (model.n_head * model.seq_len + d)
    wide = {"relu": 1, "swiglu": 4}.get(model.activation, 2)
    masks = 2 * d if model.dropout else 0
    return norms + attention + number * wide * d_mlp + masks


def count_logit_bytes(model: ModelConfig, setting: Setting, tokens: int) -> float:
    """Return the bytes around the loss at the worst moment: log-probabilities and two gradients, in fp32.

    Note: of a large vocabulary a chunk is held, and gradients of the head's input and matrix that wait (model/head.py).
    """
    number = 4 if setting.precision == "fp32" else 2
    if model.vocab_size < LARGE_VOCAB:
        return 12.0 * tokens * model.n_vocab_rows
    chunk = min(tokens * model.vocab_size, CHUNK_LOGITS)
    matrix = model.d_model * model.n_vocab_rows
    return (4.0 + 2 * number) * chunk + number * tokens * model.d_model + (4.0 + number) * matrix


def count_buffers(model: ModelConfig, setting: Setting) -> float:
    """Return bytes besides state and activations: buckets, gathered weights, copies in bf16, the head's gradient."""
    params, number = count_params(model), 2 if setting.precision == "bf16_native" else 4
    n, head = params.n_params, 4.0 * params.head_matrix
    copies = 2.0 * params.n_params_matmul if setting.precision == "bf16_autocast" else 0.0
    if setting.kind == "torch":
        buckets = 4.0 * n if setting.world_size > 1 else 0.0  # DDP's, of the gradients' size
        return copies + head + buckets
    bucket = float(number) * (BUCKET_ELEMENTS if setting.stage == 3 else min(n, BUCKET_ELEMENTS))
    gathered = float(number) * min(n, MAX_LIVE_PARAMETERS) if setting.stage == 3 else 0.0
    return copies + (head if setting.stage < 2 else 0.0) + (bucket if setting.stage else 0.0) + gathered


def find_micro_batch(model: ModelConfig, setting: Setting, memory_bytes: float, share: int) -> int | None:
    """Return the largest micro-batch that divides a rank's share of the global batch and fits; None: not even one sequence."""
    divisors = [size for size in range(share, 0, -1) if share % size == 0]
    for size in divisors:
        tried = replace(setting, micro_batch_size=size, n_micro_steps=share // size)
        if estimate_memory(model, tried).peak <= USABLE_MEMORY * memory_bytes:
            return size
    return None


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step on one rank; `exposed_s` is the communication that nothing hides."""

    compute_s: float
    communication_s: float
    exposed_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.exposed_s


@dataclass(frozen=True)
class Links:
    """How ranks are connected. Units: bytes per second, one way; within a node per device, between nodes per node."""

    devices_per_node: int
    intra_bytes_per_s: float
    inter_bytes_per_s: float


def estimate_step(model: ModelConfig, setting: Setting, device: Accelerator, links: Links) -> StepTime:
    """Estimate one optimiser step from a roofline."""
    params = count_params(model)
    micro_s = estimate_micro_step(model, setting, device)
    split = setting.world_size if setting.stage else 1
    update_s = OPTIMIZER_BYTES * params.n_params / split / device.memory_bytes_per_s
    compute_s = setting.n_micro_steps * micro_s + update_s
    return add_communication(model, setting, links, compute_s, micro_s)


def add_communication(model: ModelConfig, setting: Setting, links: Links, compute_s: float, micro_s: float) -> StepTime:
    """Put communication beside a step's arithmetic, however that is known.

    Note: DDP hides it behind the last backward pass, stage 3 prefetches, stages 0 to 2 hide nothing (harness/zero.py).
    """
    communication_s = estimate_communication(model, setting, links)
    hidden = BACKWARD * micro_s if setting.kind == "torch" else compute_s if setting.stage == 3 else 0.0
    return StepTime(compute_s, communication_s, max(0.0, communication_s - hidden))


def estimate_micro_step(model: ModelConfig, setting: Setting, device: Accelerator) -> float:
    """Estimate forward and backward of one micro-step: products at the peak's usual part, the rest at the memory's speed."""
    tokens = setting.micro_batch_size * model.seq_len
    flops, again = count_flops(model), 4 / 3 if setting.activation_checkpointing else 1.0
    products = tokens * (flops.flops_per_token - flops.head) * again + tokens * flops.head
    stored = replace(setting, activation_checkpointing=False)
    moved = tokens * (count_activation_bytes(model, stored) * again + 12.0 * model.n_vocab_rows)
    passes = PASSES_COMPILED if setting.compile else PASSES_EAGER
    busy_s = products / (PRODUCT_EFFICIENCY * device.peak(setting.precision)) + passes * moved / device.memory_bytes_per_s
    return max(busy_s, model.n_layer * CALLS_PER_LAYER * CALL_S)


def estimate_communication(model: ModelConfig, setting: Setting, links: Links) -> float:
    """Estimate seconds of collectives in one step, on rings whose slowest link decides.

    Source: Rajbhandari et al. 2020, section 7: reducing gradients and gathering weights moves each once; stage 3 gathers twice.
    """
    ranks = setting.world_size
    if ranks == 1:
        return 0.0
    number = 2.0 if setting.precision == "bf16_native" else 4.0
    once = number * count_params(model).n_params * (ranks - 1) / ranks
    n_times = {0: 2, 1: 2, 2: setting.n_micro_steps + 1, 3: 3 * setting.n_micro_steps}[setting.stage]
    slowest = links.intra_bytes_per_s
    if ranks > links.devices_per_node:
        slowest = min(slowest, links.inter_bytes_per_s)
    return once * n_times / slowest
