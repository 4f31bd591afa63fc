"""The typed recipe: every key a run can have, with its meaning under it.

Keys that reach Megatron-Core carry Megatron's own field names, so its documentation
applies. `None` means derived or off; each field says which. `python -m model.describe`
shows what is derived.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """What is trained: one hybrid Mamba-2 / attention / MoE model."""

    name: str = MISSING
    """Name used in tables and plots."""
    hybrid_layer_pattern: str = MISSING
    """One symbol a layer: M Mamba-2, * attention, E MoE, - dense MLP; `|` cuts pipeline
    stages, each `/PATTERN` at the end is one multi-token-prediction depth."""
    hidden_size: int = MISSING
    """Model width d."""
    vocab_size: int = MISSING
    """Rows of the embedding and of the output head; at least the tokenizer's size."""
    max_position_embeddings: int = 1048576
    """Longest sequence the model accepts. No position embedding: this costs nothing."""

    num_attention_heads: int = MISSING
    """Query heads of an attention layer."""
    num_query_groups: int = MISSING
    """Key/value heads of an attention layer (grouped-query attention)."""
    kv_channels: int = MISSING
    """Width of one attention head; need not be hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Inner width of dense MLP layers (`-`); required only if the pattern has one."""

    mamba_num_heads: int = MISSING
    """Mamba-2 heads; inner width is mamba_num_heads * mamba_head_dim."""
    mamba_head_dim: int = MISSING
    """Width of one Mamba-2 head."""
    mamba_state_dim: int = MISSING
    """Size N of the state of one channel."""
    mamba_num_groups: int = MISSING
    """Groups that share B and C."""
    mamba_d_conv: int = 4
    """Width of the causal convolution."""
    mamba_chunk_size: int = 128
    """Chunk of the scan; changes speed, not results."""

    num_moe_experts: int | None = None
    """Routed experts of a MoE layer."""
    moe_router_topk: int = 2
    """Routed experts a token uses."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of one routed expert."""
    moe_shared_expert_intermediate_size: int | None = None
    """Inner width of the shared expert every token uses."""
    moe_latent_size: int | None = None
    """LatentMoE width l: experts read and write l instead of hidden_size. null: no latent."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor on the normalised weights of the chosen experts."""
    moe_router_score_function: str = "sigmoid"
    """sigmoid or softmax."""
    moe_router_dtype: str | None = "fp32"
    """Precision of the router product."""
    moe_router_enable_expert_bias: bool = True
    """Balance load by a bias on the selection score (no gradient)."""
    moe_router_bias_update_rate: float = 1.0e-3
    """Step of that bias per optimizer step."""
    moe_router_load_balancing_type: str = "seq_aux_loss"
    """aux_loss, seq_aux_loss, global_aux_loss or none."""
    moe_aux_loss_coeff: float = 1.0e-4
    """Weight of the load-balancing loss."""
    moe_router_num_groups: int | None = None
    """Groups of experts for group-limited routing; null: one group."""
    moe_router_group_topk: int | None = None
    """Groups a token may use."""
    moe_router_force_load_balancing: bool = False
    """Route at random and evenly. Changes the training objective: benchmarks only."""

    mtp_use_repeated_layer: bool = True
    """One multi-token-prediction block applied at every depth instead of one block each."""
    mtp_loss_scaling_factor: float = 0.3
    """Weight of the mean of the depths' losses in the total loss."""

    init_method_std: float | None = None
    """Standard deviation of the initial weights; null: sqrt(0.8 / hidden_size)."""
    layernorm_epsilon: float = 1.0e-5
    """Epsilon of every RMSNorm. The gated norm of Mamba is fixed at 1e-5 in Megatron."""
    fp32_residual_connection: bool = False
    """Keep the residual stream in FP32; only with FP32 weights."""
    hidden_dropout: float = 0.0
    """Dropout of every residual branch."""
    attention_dropout: float = 0.0
    """Dropout of attention weights."""


@dataclass
class PrecisionRule:
    """In what format some matrix products run. Rules are tried in order; the first that matches
    a module decides for it."""

    layers: Any = "all"
    """Where: all, mtp (multi-token prediction), `last 15%`, `first 2`, a number, a range `0-13`
    or a list of these. Layers are counted from 0 over the whole decoder; shares are rounded up."""
    module: str = "*"
    """Which: a glob over names inside a layer: mixer.in_proj, mixer.out_proj,
    self_attention.linear_qkv, self_attention.linear_proj, mlp.fc1_latent_proj,
    mlp.fc2_latent_proj, mlp.experts.linear_fc1, mlp.shared_experts.linear_fc1,
    mlp.linear_fc1 (and ...fc2), and eh_proj of MTP."""
    format: str = "bf16"
    """nvfp4, mxfp8, bf16 (not quantised: params_dtype), or nvfp4_backward, mxfp8_backward
    (forward product not quantised, both gradients in that format)."""
    why: str = ""
    """The reason, shown by `python -m precision.explain`."""
    optional: bool = False
    """The model may have nothing for this rule to decide. Otherwise that is an error."""


@dataclass
class PrecisionSwitch:
    """Other formats from some point of the run on. Off while `at_tokens` and `at_fraction` are
    both null."""

    at_tokens: float | None = None
    """Switch at the first step that starts with so many tokens of the stage consumed."""
    at_fraction: float | None = None
    """The same as a share of the tokens of the stage."""
    to: str | None = None
    """New format of every quantised module: bf16, bf16_forward (gradients stay as they are),
    mxfp8 or nvfp4. Modules that were not quantised stay so."""
    rules: list[PrecisionRule] = field(default_factory=list)
    """Instead of `to`: the rules from then on."""


@dataclass
class PrecisionConfig:
    """In what numbers."""

    name: str = MISSING
    """Name used in tables and plots."""
    params_dtype: str = "bf16"
    """Parameters, activations and gradients: bf16 or fp32. Optimizer state is FP32."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in FP32. BF16 loses the small MTP gradients."""
    rules: list[PrecisionRule] = field(default_factory=lambda: [PrecisionRule(optional=True)])
    """The format of every matrix product that can be quantised; without any rule, none is."""
    extra_rules: list[PrecisionRule] = field(default_factory=list)
    """Tried before `rules`: exceptions of one's own, without repeating a whole recipe."""
    protected_layers: Any = "last 15%"
    """The layers that the shipped nvfp4 recipe keeps in BF16: its rule refers to this key."""
    evaluation: str | None = None
    """Format of the quantised modules in validation: bf16, mxfp8 or nvfp4; null: as in
    training."""
    disable_rht: bool = False
    """NVFP4 without the random Hadamard transform of the weight gradient's operands."""
    disable_stochastic_rounding: bool = False
    """NVFP4 gradients rounded to nearest."""
    disable_2d_quantization: bool = False
    """NVFP4 weights with scales of 1x16 instead of 16x16, so that W and W^T differ."""
    switch: PrecisionSwitch = field(default_factory=PrecisionSwitch)
    """A change of formats during the run."""


@dataclass
class ParallelConfig:
    """Where it runs. world = tp * cp * pp * dp = etp * ep * pp * edp: the experts are spread
    over the ranks of the dense layers, so the fewest ranks are pp * lcm(tp * cp, etp * ep)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share one layer's matrices (tp)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers (pp)."""
    context_parallel_size: int = 1
    """Ranks that share one sequence (cp)."""
    cp_comm_type: str = "p2p"
    """How attention meets the keys of other context-parallel ranks: p2p (a ring), all_gather
    (of keys and values) or a2a (every rank sees the whole sequence for its share of heads)."""
    mamba_context: str = "heads"
    """How Mamba layers cross context-parallel ranks: heads (Megatron's: every rank sees the whole
    sequence for its share of heads) or state (every rank keeps its tokens and all heads; states
    are passed on)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer (ep)."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share one expert's matrices (etp)."""
    sequence_parallel: bool | None = None
    """Split activations along the sequence between tensor-parallel ranks; null: tp > 1."""
    data_parallel_size: int | None = None
    """Ranks that split the batch (dp, on the grid of the dense layers); null: what the
    launched ranks allow, or the fewest the layout needs."""
    moe_token_dispatcher_type: str = "alltoall"
    """alltoall or allgather; flex needs GPUs."""
    moe_flex_dispatcher_backend: str = "deepep"
    """Of flex: deepep, or hybridep where NVLink domains span nodes. Both are NVIDIA's or DeepSeek's
    package deep_ep."""
    moe_flex_dispatcher_num_sms: int | None = None
    """Of flex: streaming multiprocessors that send; null: the package's default."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass runs."""
    recompute_granularity: str | None = None
    """null, selective or full."""
    recompute_modules: list[str] | None = None
    """Modules recomputed when selective: core_attn, moe_act, layernorm, moe, ..."""
    recompute_method: str | None = None
    """uniform or block, when full."""
    recompute_num_layers: int | None = None
    """Layers of one recomputed unit, when full."""
    cross_entropy_loss_chunk: int | None = None
    """Tokens whose logits exist at one time in the output head and the multi-token-prediction
    losses; computed again in the backward pass. null: all tokens of a micro batch."""
    timeout_minutes: float = 10.0
    """A collective that takes longer ends the run."""


@dataclass
class BlendEntry:
    """One source of a blend."""

    path: str = MISSING
    """Prefix of a .bin/.idx pair written by `python -m data.prepare`."""
    weight: float = 1.0
    """Share of the samples, normalised over the blend."""


@dataclass
class TokenizerConfig:
    """How text becomes tokens."""

    library: str = "huggingface"
    """huggingface (directory), tiktoken (JSON file) or byte-level."""
    path: str | None = None
    """Directory or file of the tokenizer; byte-level needs none."""
    train_vocab_size: int | None = None
    """`data.prepare` trains a byte-level BPE of this size at `path` if there is none."""


@dataclass
class SourceConfig:
    """One text source that `data.prepare` turns into one .bin/.idx pair."""

    output: str = MISSING
    """Prefix of the .bin/.idx pair to write."""
    dataset: str = MISSING
    """json, parquet or text (with data_files), a hub name, `code`: the Python source code of
    installed packages, no download needed, or `packages`: the same, each package one document."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of the data set."""
    data_files: list[str] = field(default_factory=list)
    """Files or globs of a json, parquet or text data set."""
    text_key: str = "text"
    """Column that holds the text."""
    packages: list[str] = field(default_factory=list)
    """Packages of a `code` or `packages` source; `stdlib` is the Python standard library."""
    max_megabytes: float | None = None
    """Stop after so much text (10^6 bytes)."""


@dataclass
class DataConfig:
    """What it reads."""

    name: str = MISSING
    """Name used in messages."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer every source of this recipe is written with."""
    train: list[BlendEntry] = field(default_factory=list)
    """Training blend."""
    validation: list[BlendEntry] = field(default_factory=list)
    """Held-out blend; empty: no validation."""
    sources: list[SourceConfig] = field(default_factory=list)
    """What `python -m data.prepare` makes."""
    prepare_if_missing: bool = False
    """Let `python -m train` prepare the data itself when it is not there yet."""
    prepare_workers: int = 2
    """Processes that tokenize."""
    cache: str | None = None
    """Folder of sample indices; null: beside the data."""
    inter_document_masking: bool = False
    """Documents packed into one sample do not see each other: attention, convolution, state and
    multi-token prediction end where a document ends, and its last token predicts nothing."""


@dataclass
class OptimizerConfig:
    """How the weights move."""

    optimizer: str = "adam"
    """adam (decoupled weight decay, so AdamW)."""
    lr: float = MISSING
    """Peak learning rate."""
    min_lr: float = MISSING
    """Learning rate at the end of the decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1.0e-8
    """Epsilon of Adam."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and vectors have none."""
    clip_grad: float = 1.0
    """Gradient norm is clipped to this; 0: no clipping."""
    lr_decay_style: str = "WSD"
    """WSD (warmup, stable, decay), cosine, linear or constant."""
    lr_wsd_decay_style: str = "minus_sqrt"
    """Shape of the WSD decay: minus_sqrt, linear, cosine or exponential."""
    lr_warmup_tokens: float | None = None
    """Tokens of the linear warmup; null: lr_warmup_fraction of the schedule."""
    lr_warmup_fraction: float = 0.008
    """Used when lr_warmup_tokens is null."""
    lr_wsd_decay_tokens: float | None = None
    """Tokens of the WSD decay; null: lr_wsd_decay_fraction of the schedule."""
    lr_wsd_decay_fraction: float = 0.2
    """Used when lr_wsd_decay_tokens is null."""
    lr_schedule_tokens: float | None = None
    """Tokens of the whole schedule; null: the tokens of the stage, or of the stages, one after the
    other, that have these same lr* and min_lr: they share one schedule."""


@dataclass
class LengthConfig:
    """Another sequence length for a share of the steps of a stage."""

    share: float = MISSING
    """Share of the steps that have it. The order is fixed: at every step the length that is
    furthest behind its share, of equals the first, the stage's own before all."""
    sequence_length: int = MISSING
    """Tokens of one sequence in these steps."""
    global_batch_size: int = MISSING
    """Sequences of one of these steps."""
    micro_batch_size: int = 1
    """Sequences of one forward pass on one rank in these steps."""
    train: list[BlendEntry] = field(default_factory=list)
    """What these steps read; empty: data.train. A path that several lengths of a stage read is
    divided between them, document by document."""


@dataclass
class StageConfig:
    """How much, how long, how often."""

    name: str = "pretrain"
    """Name of the stage; of one of `stages`, its name there."""
    sequence_length: int = MISSING
    """Tokens of one sequence."""
    global_batch_size: int = MISSING
    """Sequences of one optimizer step."""
    micro_batch_size: int = 1
    """Sequences of one forward pass on one rank."""
    train_steps: int | None = None
    """Optimizer steps; null: from train_tokens."""
    train_tokens: float | None = None
    """Tokens to train on; null: from train_steps."""
    eval_interval: int | None = None
    """Validate every so many steps; null: only at the end."""
    eval_steps: int = 8
    """Global batches of one validation."""
    mix: list[LengthConfig] = field(default_factory=list)
    """Other sequence lengths, each for a share of the steps; the rest have those above."""


@dataclass
class CheckpointConfig:
    """When the state is written and what is kept."""

    load: str | None = None
    """Start from the weights of this checkpoint or run (optimizer, schedule and data start anew),
    unless run.dir has a checkpoint of its own."""
    save_interval: int | None = None
    """Save every so many steps; null: only at the end and on a signal."""
    async_save: bool = False
    """Write in the background while training goes on."""
    keep_last: int | None = 2
    """Keep the newest so many checkpoints; null: all."""
    keep_every: int | None = None
    """Also keep each checkpoint whose step is a multiple of this."""
    allow_previous: bool = False
    """If the newest checkpoint is damaged, resume from the one before it."""


@dataclass
class GuardConfig:
    """What stops a run that goes wrong."""

    non_finite: str = "stop"
    """On a loss or gradient that is not finite: stop, skip (drop that update) or rollback
    (load the last checkpoint and skip the offending batch)."""
    max_non_finite: int = 3
    """Stop after so many skips or rollbacks."""
    progress_timeout_minutes: float | None = None
    """A rank that takes longer for one micro batch (validation and a checkpoint between two of them
    included) writes down its stacks and ends the run; null: 0.9 * parallel.timeout_minutes, with
    one rank no limit."""


@dataclass
class LoggingConfig:
    """What is written while it runs."""

    progress: bool = True
    """Live progress bar on rank 0."""
    tensorboard: bool = False
    """Write TensorBoard events to run.dir/tensorboard."""
    wandb: str = "disabled"
    """disabled, offline or online."""
    wandb_project: str = "strata"
    """Project of the wandb run."""
    log_params_hash: bool = False
    """Write a hash of all parameters into each metrics line (slow; for comparisons)."""
    expert_load: bool = False
    """Write the tokens of every expert of every MoE layer into each metrics line."""
    precision_interval: int | None = None
    """Every so many steps, write what quantisation does to each tensor to precision.jsonl: values
    flushed to zero, cut off, relative error. Costs about one more step each time; null: never, but
    four times in an arm of train.compare that quantises."""


@dataclass
class CompareConfig:
    """What `python -m train.compare` compares. A single run ignores it."""

    precisions: list[str] = field(default_factory=list)
    """Recipes of the group `precision` to train and compare; the first is the baseline."""
    models: list[str] = field(default_factory=list)
    """Or recipes of the group `model`; the first is the baseline."""
    seeds: int = 1
    """Train each of them with so many seeds: run.seed, run.seed + 1, ..."""
    runs: list[str] = field(default_factory=list)
    """Instead: directories of finished runs; the first is the baseline. Nothing is trained."""
    budget: float = 0.01
    """Relative loss gap an arm may have in the last quarter of the run; 0.01 is 1 %."""


@dataclass
class ParityConfig:
    """What `python -m parallel.parity` trains. A single run ignores it."""

    layouts: list[str] = field(default_factory=list)
    """Layouts compared with one rank, by their names in its table; empty: all of them."""


@dataclass
class SensitivityConfig:
    """What `python -m precision.sensitivity` looks for. A single run ignores it."""

    budget: float = 5.0e-4
    """Relative held-out loss that quantised forward passes may cost; 0.0005 is 0.05 %."""
    measure: str = "alone"
    """How a module is measured: quantised alone, or protected (all others quantised)."""
    batches: int = 4
    """Global batches the modules are measured on; as many others judge the policy."""


@dataclass
class EnvironmentVariable:
    """One variable that every rank of a job gets."""

    name: str = MISSING
    """Its name."""
    value: str = MISSING
    """Its value; `$NAME` of the job's shell is not expanded."""
    why: str = MISSING
    """The reason, written beside it into the job script."""


@dataclass
class ContainerConfig:
    """In what image the ranks run."""

    runtime: str = "none"
    """none, pyxis (srun --container-image, enroot) or apptainer."""
    image: str | None = None
    """Image: a .sqsh file or registry name for pyxis, a .sif file for apptainer."""
    mounts: list[str] = field(default_factory=list)
    """`/outside:/inside`. Run directory, data and this project must be among them."""


@dataclass
class HealthConfig:
    """What every node must pass before the ranks start."""

    enabled: bool = True
    """Check at all."""
    timeout_seconds: int = 120
    """A node that has not answered by then is bad."""
    min_free_disk_gb: float = 1.0
    """Free space (10^9 bytes) where the run directory is and in the scratch folder."""
    min_free_memory_gb: float = 1.0
    """Memory a node must have to spare (10^9 bytes)."""
    max_clock_skew_seconds: float = 10.0
    """A node's clock may differ so much from that of the first node."""
    max_gpu_temperature: int = 85
    """Degrees Celsius of a GPU before the run."""
    max_gpu_memory_used_mb: int = 2000
    """GPU memory somebody else holds (10^6 bytes)."""
    all_reduce_mb: float = 16.0
    """Sum so many megabytes over all ranks once, and compare; 0: do not."""


@dataclass
class PlanConfig:
    """What `python -m parallel.plan` does. A run ignores it."""

    ranks: int | None = None
    """GPUs to plan for; null: the fewest the layout needs."""
    search: bool = False
    """Look for the layouts of these GPUs that fit and rank them by predicted throughput."""
    show: int = 10
    """Layouts of the search to show."""


@dataclass
class ConvertConfig:
    """What `python -m model.convert` converts. Training ignores it."""

    source: str | None = None
    """Run directory, checkpoint or Hugging Face folder to read; the first path given."""
    target: str | None = None
    """Folder to write; the second path given."""
    dtype: str | None = None
    """bf16 or fp32, for all but the FP32 vectors; null: as in the source."""
    quantize: str | None = None
    """Of to_hf: a precision policy (nvfp4, ...) whose nvfp4 modules are written with NVFP4 weights,
    in modelopt's format W4A16_NVFP4; null: none."""
    calibration: str | None = None
    """With quantize: what `python -m train.calibrate` wrote, for scales of activations too, in
    modelopt's format NVFP4; null: weights alone."""
    shard_gigabytes: float = 5.0
    """Size of one file (10^9 bytes)."""
    workers: int = 2
    """Files written at once."""
    verify: bool = True
    """Compare each file of the checkpoint with its checksum before it is first read."""
    tokenizer: str | None = None
    """Folder of the tokenizer to export; null: the run's."""


@dataclass
class MergeConfig:
    """What `python -m model.merge` averages. Training ignores it."""

    sources: list[str] = field(default_factory=list)
    """Checkpoints, oldest first; or one run, for its checkpoints."""
    target: str | None = None
    """Folder to write; the last path given."""
    last: int | None = None
    """Only the newest so many checkpoints of a run; null: all it has kept."""
    weights: list[float] = field(default_factory=list)
    """Weight of each, oldest first; empty: those that emulate a minus-sqrt decay."""
    evaluate: bool = True
    """Then print the validation loss of each checkpoint and of their mean."""
    shard_gigabytes: float = 5.0
    """Size of one file (10^9 bytes)."""
    workers: int = 2
    """Files written at once."""


@dataclass
class ClusterConfig:
    """Where the ranks come from. All but the first two keys are for `python -m slurm.submit`."""

    name: str = "local"
    """Name used in messages."""
    threads_per_rank: int | None = None
    """CPU threads of one rank on a host; null: cores / local ranks, at most OMP_NUM_THREADS."""
    scheduler: str = "none"
    """none: this machine; slurm: jobs of a Slurm cluster."""
    partition: str | None = None
    """Partition; null: the site's default."""
    account: str | None = None
    """Account that is charged; null: the user's default."""
    qos: str | None = None
    """Quality of service; null: the default."""
    nodes: int | None = None
    """Nodes of a job; null: as many as the fewest ranks of the layout need."""
    gpus_per_node: int = 0
    """GPUs of a node, each with one rank; 0: ranks without a GPU, see ranks_per_node."""
    request_gpus: bool = True
    """Ask for them with --gpus-per-node; false: the site gives whole nodes."""
    ranks_per_node: int | None = None
    """Ranks of a node; null: gpus_per_node."""
    gpus_per_numa_node: int | None = None
    """Bind rank i of a node to memory and cores of NUMA node i // this (numactl; torchrun asks
    the GPU itself); null: no binding."""
    cpus_per_rank: int | None = None
    """Cores of a rank; null: the site's default."""
    memory_per_node: str | None = None
    """Memory of a node as Slurm writes it (`0`: all of it); null: the site's default."""
    exclusive: bool = False
    """Share no node with other jobs."""
    time_limit: str = "4:00:00"
    """Limit of one start: minutes, H:MM:SS or D-HH:MM:SS. The chain goes on in the next one."""
    warning_seconds: int = 300
    """So long before the limit the ranks are told to finish the step and save. Slurm may be up
    to a minute early."""
    chain_length: int = 100
    """Most times one submission starts."""
    max_strikes: int = 3
    """Failures in a row without a new checkpoint after which the chain gives up."""
    dependency: str | None = None
    """Start when these jobs let it: `afterok:123`, `singleton`, ..."""
    sbatch: list[str] = field(default_factory=list)
    """Further #SBATCH options, such as --constraint=h100."""
    srun: list[str] = field(default_factory=list)
    """Further options of the training step's srun."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    scratch: str | None = None
    """Fast folder of every node (TMPDIR and caches of compiled kernels); null: /tmp."""
    environment: list[EnvironmentVariable] = field(default_factory=list)
    """Variables of every rank, each with its reason."""
    launcher: str = "srun"
    """srun: one task a rank; torchrun, or ft (nvidia-resiliency-ext): one launcher a node."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """The image the ranks run in."""
    python: str | None = None
    """Python of the ranks; null: the one that runs slurm.submit."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Checks of every node before the ranks start."""
    gpu: str = "h100"
    """What `python -m parallel.plan` plans for: h100, h200, b200, b300, gb200 or gb300."""


@dataclass
class RunConfig:
    """One run and its directory."""

    dir: str = MISSING
    """The run directory. The same directory resumes the same run."""
    seed: int = 1234
    """Seed of weights and data order."""
    stage: str | None = None
    """Only this one of `stages`, as a run of its own; null: all of them, one after the other."""


@dataclass
class Recipe:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stages: dict[str, Any] = field(default_factory=dict)
    """Stages of the run, in order: name -> what it changes in this recipe, as recipes of `data`,
    `optimizer`, `precision`, `parallel` and `stage` (`data: mine`) or as keys (`data.train: [...]`,
    `checkpoint.save_interval: 50`). Empty: one stage, this recipe. null takes a stage out."""
    device: str = "auto"
    """auto (CUDA if there is a GPU), cuda or host."""
    traceback: bool = False
    """Show the traceback of a user error."""
    dry_run: bool = False
    """`python -m slurm.submit` prints the job script and queues nothing."""
