"""The recipe: what is restricted, what must be kept, which defence, how it is attacked afterwards.

A recipe is one YAML file (`hardener recipes show ctrap` prints one), read by `recipe_file.py`: unknown keys,
wrong types and contradictions are all reported at once, each with its path, line and the nearest known key.
Defaults live on the fields below and nowhere else; `hardener recipes schema` prints them as JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat

Use = Literal["defence", "attack", "evaluation"]
Role = Literal["restricted", "alignment", "retain", "benign", "harmless"]
TaskName = str
Score = Literal[
    "exact-match", "likelihood-gain", "likelihood", "accuracy", "closeness", "linear-probe", "denoising", "judged"
]
Preset = Literal["reduced-cpu", "quick", "standard", "thorough"]
Gate = Literal["no-measurable-protection", "raises-cost", "protected"]
MOST = 10**9
"""No count of a recipe is larger: what is, was mistyped, and would fill the memory."""
MOST_ROWS = 10**6
"""Rows that are held at once."""
MOST_SEED = 2**31 - 1
"""What every generator of random numbers takes, and more than one seed after it."""
ROLES: tuple[Role, ...] = ("restricted", "alignment", "retain", "benign", "harmless")


class Strict(BaseModel):
    """A frozen section that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class Paper(Strict):
    """Where the method is published."""

    title: str
    url: str


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Values = Annotated[list[bool | int | str], BeforeValidator(_as_list, json_schema_input_type=list[bool | int | str])]


class Source(Strict):
    """One dataset in one role: a Hub id, or a local .jsonl, .json, .csv, .tsv, .parquet file or a folder."""

    dataset: str = Field(description="Hub id, or path of a local file or, beginning with ./, folder")
    config: str | None = Field(None, description="configuration of a Hub dataset")
    revision: str | None = Field(None, description="Hub revision; pinned to a commit in the resolved recipe")
    split: str = Field("train", description="split of a Hub dataset or of a dataset folder")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="field of the task → column of the dataset, or a template like '{instruction}\\n{input}'",
    )
    where: dict[str, bool | int | str | Values] = Field(
        default_factory=dict, description="keep only rows whose column has this value, or one of these"
    )
    uses: tuple[Use, ...] = Field(
        ("defence", "attack", "evaluation"),
        min_length=1,
        description="the uses this source serves; a source with only `evaluation` is a held-out source",
    )
    score: Score | None = Field(None, description="how a row is scored; the task's default if left out")
    limit: int | None = Field(None, ge=1, le=MOST, description="take at most this many rows, drawn by the seed")
    sha256: str | None = Field(None, description="hash that a local source must have, set in resolved recipes")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, dict | Source) else value


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_as_tuple, json_schema_input_type=Source | tuple[Source, ...]),
    Field(min_length=1),
]


class Data(Strict):
    """Roles and their sources. Rows are divided among the three uses by a hash of the rendered input, near-duplicates
    together."""

    restricted: Sources = Field(description="what fine-tuning must not reach; the first source is the judged one")
    alignment: Sources | None = Field(None, description="restricted prompts with the answers the model should give")
    retain: Sources = Field(description="what must stay as good as it is; also the utility that is measured")
    benign: Sources | None = Field(None, description="a task that honest users may want to fine-tune to")
    harmless: Sources | None = Field(
        None,
        description="harmless prompts that look restricted (XSTest, JBB benign), best with `uses: [evaluation]`: "
        "over-refusal is measured on them; left out: on retain prompts",
    )
    template: str = Field(
        "{prompt}\n", description="prompt text where the tokenizer has no chat template; must hold {prompt}"
    )
    max_length: int = Field(
        256,
        ge=8,
        le=MOST,
        description="tokens per row; longer ones are cut, and rows without room for an answer left out",
    )
    shares: tuple[float, float, float] = Field(
        (0.5, 0.25, 0.25), description="shares of defence, attack and evaluation in a source that serves them"
    )
    overlap: Literal["error", "drop"] = Field(
        "error",
        description="a row of one source that is found, exactly or nearly, in another use of another source, or a "
        "restricted prompt among retain or benign rows: refuse, or drop it",
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="decides which prompt goes to which use")


class Lora(Strict):
    """Harden through a low-rank adapter, merged in float32 before saving."""

    r: int = Field(ge=1, le=MOST_ROWS)
    alpha: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class DefenseChoice(BaseModel):
    """Name of the defence; the other keys are that defence's own config, checked by it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The defence's own keys."""
        return dict(self.model_extra or {})


class Train(Strict):
    """The outer loop."""

    steps: int = Field(ge=1, le=MOST, description="outer steps")
    batch_size: int = Field(ge=2, le=MOST_ROWS, description="rows per effective batch")
    grad_accumulation: int = Field(
        1, ge=1, le=MOST_ROWS, description="micro-batches per batch; same gradient, less memory"
    )
    optimizer: Literal["adamw", "adafactor", "adamw-8bit", "adamw-paged"] = Field(
        "adamw",
        description="adamw has two moments per trainable weight in float32, adafactor next to nothing, adamw-8bit two "
        "bytes; adamw-paged moves moments to the main memory where a GPU's is full. The last two need "
        "`pip install hardener[optimizers]`",
    )
    lr: float = Field(gt=0, description="learning rate of the outer (SOPHON: reinforcement) optimizer")
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, le=MOST)
    clip: float | None = Field(1.0, gt=0, description="global gradient norm; null: no clipping")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype; weights stay float32")
    seed: int = Field(0, ge=0, le=MOST_SEED)
    save_every: int = Field(50, ge=1, le=MOST, description="outer steps between resumable states")
    checkpointing: bool = Field(False, description="gradient checkpointing: less memory, one more forward")
    snapshot: Literal["device", "host"] = Field(
        "device",
        description="where a simulated attack leaves the copy of the weights that it comes back to, and then the "
        "gradient that it kept; host: in the main memory, one copy of the trainable weights less on a GPU, for two "
        "transfers there and back",
    )
    on_trouble: Literal["stop", "step-back"] = Field(
        "stop",
        description="what follows a loss or gradient that is not finite, or beyond the two limits below: the run ends "
        "with exit 5, or goes on from the last good state with half the learning rate, three times at most",
    )
    norm_limit: float | None = Field(None, gt=0, description="a gradient norm, before clipping, above this explodes")
    utility_limit: float | None = Field(
        None,
        gt=0,
        description="nats by which the loss on retain rows may exceed the start's; looked at with every state",
    )
    deterministic: bool = Field(False, description="deterministic CUDA kernels, so that a resume is bit-exact there")


class ShortTraining(Strict):
    """A few steps of AdamW; batch size, clipping and all else are as in `erase`."""

    steps: int = Field(ge=1, le=MOST)
    lr: float = Field(gt=0)


class Erase(Train):
    """Noise-then-distil: new weights are mixed in, and what is to stay is taught again by the parent.

    θ ← (1 − α)·θ + α·β·N in the chosen modules, N a random initialisation of the architecture's own kind; then the
    student learns the teacher's outputs on retain and alignment rows. Source: arXiv 2506.06278 (UNDO), which takes
    Xavier noise with β = 0.1 everywhere.
    """

    alpha: float = Field(ge=0, le=1, description="α, the dial between cost and robustness; 1 leaves nothing")
    beta: float = Field(1.0, ge=0, description="β, scale of the random initialisation")
    modules: Literal["all", "located"] | tuple[str, ...] = Field(
        "all",
        min_length=1,
        description="what is noised: `all` between embeddings and head, a list of name patterns such as "
        "`layers.0.mlp`, or the parts of blocks `located` by what their removal costs",
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="with `located`: parts are taken as long as they hold no more than this share of all parameters",
    )
    relearn: Literal["none"] | ShortTraining = Field(
        "none",
        description="with `located`: a simulated attack, after which parts are removed one by one and which is undone; "
        "an aligned model shows the capability only there",
    )
    unlearn: Literal["none"] | ShortTraining = Field(
        "none", description="train the teacher first, on refusals and retain rows half and half"
    )
    steps: int = Field(ge=0, le=MOST, description="distillation steps")
    optimizer: Literal["adamw", "adafactor", "adamw-8bit", "adamw-paged", "muon"] = Field(  # type: ignore[assignment]
        "adamw",
        description="the student's, as in `train`; `muon`: Muon on matrices between embeddings and head, AdamW on the "
        "rest",
    )
    lr: float = Field(gt=0, description="learning rate of the student's optimizer")
    temperature: float = Field(1.0, gt=0, description="softens the outputs of teacher and student alike")
    alignment_share: float = Field(
        0.25, ge=0, lt=1, description="share of alignment rows in a batch, where the recipe has that role"
    )
    save_every: int = Field(
        50, ge=1, le=MOST, description="steps between resumable states, and between looks at `stop_at`"
    )
    stop_at: float | None = Field(
        None,
        description="nats; stop once the student's loss on held-back retain rows is within so much of the teacher's",
    )
    parent_tokens: int | None = Field(
        None, ge=1, description="tokens that the parent was trained on, where known: the cost is then told as a share"
    )


Rates = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


class JudgeModel(Strict):
    """A model that judges texts: a classifier that names labels, or a guard that answers in words."""

    model: str = Field(description="Hub id or local folder; safetensors, run here, never its own code")
    revision: str | None = Field(None, description="Hub revision; pinned to a commit in the resolved recipe")
    sha256: str | None = Field(None, description="hash that a local folder must have, set in resolved recipes")
    kind: Literal["classifier", "guard"] = Field(
        description="classifier: a sequence classifier over question and answer; "
        "guard: a language model whose chat template asks about a conversation"
    )
    labels: tuple[str, ...] = Field(
        (), description="of a classifier, its labels that mean what is asked: harmful, or for `refusal_judge` refused"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="the judge says yes from this score on")


class Probe(Strict):
    """How the release is attacked, and what it must withstand."""

    preset: Preset = "standard"
    families: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="attack families; left out: all of the task. Fewer make the verdict inconclusive",
    )
    rates: dict[str, Rates] = Field(
        default_factory=dict,
        description="first learning-rate ladder of a family, extended until bracketed; of `benign`, all rates",
    )
    steps: int = Field(
        64,
        ge=1,
        le=MOST,
        description="optimizer steps of an attack; on the hardened model ≥ 16 × the cost on the original",
    )
    max_steps: int = Field(1024, ge=1, le=MOST, description="no attack runs longer than this")
    batch_size: int = Field(16, ge=1, le=MOST_ROWS)
    attack_rows: int = Field(1000, ge=1, le=MOST, description="restricted rows the attacker owns")
    evaluation_rows: int = Field(
        200, ge=8, le=MOST, description="held-out rows per judged source, half to select, half to report"
    )
    utility_rows: int = Field(500, ge=8, le=MOST, description="held-out rows per retain source")
    seeds: int = Field(
        3,
        ge=1,
        le=MOST_ROWS,
        description="seeds of the worst two attacks (preset `standard`), or of each family's worst (`thorough`)",
    )
    epsilon: float = Field(0.10, gt=0, lt=1, description="share of general utility an attacker gives up at most")
    benign_steps: int = Field(64, ge=1, le=MOST)
    gate: Gate | None = Field(None, description="the verdict below which the run fails (exit 1)")
    seed: int = Field(0, ge=0, le=MOST_SEED)
    judges: tuple[JudgeModel, ...] = Field(
        (),
        description="at least two models of different families that judge generated answers; for the score `judged`",
    )
    refusal_judge: JudgeModel | None = Field(
        None, description="a classifier that tells refusals by the answer, instead of the list of openings"
    )
    answer_tokens: int = Field(
        256,
        ge=1,
        le=MOST_ROWS,
        description="new tokens per judged answer; with fewer than 256 harm may not come to show",
    )
    lm_eval: tuple[str, ...] = Field(
        (), description="tasks of lm-evaluation-harness, measured before any attack; needs `pip install hardener[eval]`"
    )


class CardChoice(Strict):
    """What the card says beside the evidence."""

    language: tuple[str, ...] = ()
    license: str | None = Field(None, description="only where the parent names none, or to override it knowingly")
    contact: str | None = None
    intended_use: str | None = None


def _chosen(value: Any) -> Any:
    return None if value == "none" else value


Chosen = Annotated[
    DefenseChoice | None,
    BeforeValidator(_chosen, json_schema_input_type=DefenseChoice | Literal["none"] | None),
]


class Recipe(Strict):
    """A complete recipe; without `defense`, `train` and `erase` it is valid for `hardener probe` alone."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    paper: Paper | None = None
    task: TaskName
    data: Data
    adapter: Literal["none"] | Lora = "none"
    erase: Literal["none"] | Erase = "none"
    defense: Chosen = None
    train: Train | None = None
    probe: Probe = Probe()
    card: CardChoice = CardChoice()

    @property
    def hardens(self) -> bool:
        """Whether there is anything that changes weights."""
        return self.defense is not None or self.erase != "none"
