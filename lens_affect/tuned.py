"""The result of tuning one arm: what was trained, how it went, what it reached; as weight changes, and as files for other tools."""

import importlib.util
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from lens_affect.arms import Arm
from lens_affect.results import Provenance, load_result, save_result
from lens_affect.tasks import TaskScores

SCALE = 2.0
"""alpha / r of LoRA at every rank, as AffectGPT has it (r 16, alpha 32; arXiv:2501.16566)."""


@dataclass(frozen=True)
class Tuned:
    """One arm: what was trained, how it went, and what the model reached before and after."""

    arm: Arm
    """The maps, their ranks and the number of trained weights."""
    task: str
    """Name of the task that was learned."""
    seed: int
    """Of the weights' start, of the batches, and of random maps."""
    rate: float
    """Highest learning rate."""
    steps: int
    """Steps that were planned."""
    best_step: int
    """Step whose weights were kept: the lowest validation loss; 0 is the untuned model."""
    exploded: bool
    """Whether the loss exploded; the scores after are NaN then."""
    note: str
    """How it ended, in words."""
    curve: pd.DataFrame
    """Columns step, train_loss (mean since the last row), validation_loss, validation_exact (share of answers whose every token is likeliest)."""
    before: TaskScores
    """Of the untuned model."""
    after: TaskScores
    """Of the tuned one, on the same examples."""
    trained: dict[str, Tensor]
    """LoRA factors (`... .lora_A.weight`, `... .lora_B.weight`) or whole weights, under Hugging Face's names."""
    seconds: float
    """Wall-clock time of training, validation included, without the choice of the rate and the scoring."""
    cpu_seconds: float
    """Processor time of the same: what it cost where other jobs share the machine."""
    peak_megabytes: float
    """Highest resident memory of the process while training; NaN where the system does not say."""
    provenance: Provenance
    """Of the model and this step."""

    @property
    def gain(self) -> float:
        """Score after minus score before, in the task's better direction."""
        sign = 1.0 if self.after.better == "high" else -1.0
        return sign * (self.after.value - self.before.value)

    def to_frame(self) -> pd.DataFrame:
        """One row: the arm, its size and cost, and its scores."""
        row = {
            "task": self.task,
            "arm": self.arm.name,
            "method": self.arm.method,
            "seed": self.seed,
            "n_parameters": self.arm.n_parameters,
            "n_wanted": self.arm.n_wanted,
            "rate": self.rate,
            "steps": self.steps,
            "best_step": self.best_step,
            "metric": self.after.metric,
            "before": self.before.value,
            "after": self.after.value,
            "n": self.before.n,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_megabytes": self.peak_megabytes,
            "exploded": self.exploded,
        }
        return pd.DataFrame([row])

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder; see results.save_result."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tuned":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        after = self.after.interval()
        return (
            f"{self.arm}; seed {self.seed}, rate {self.rate:g}, best step {self.best_step} of {self.steps} ({self.note})\n"
            f"{self.after.title}: {self.after.metric} {self.before.value:.3f} before, {self.after.value:.3f} "
            f"[{float(after.low):.3f}, {float(after.high):.3f}] after, n = {self.before.n}; {self.cpu_seconds:.0f} s of processor time"
        )


def require_peft() -> None:
    """Refuse LoRA where peft is not installed.

    Raises:
        RuntimeError: with what to install.
    """
    if importlib.util.find_spec("peft") is None:
        raise RuntimeError(
            "LoRA needs peft, which is not installed: pip install 'lens-affect[tuning]', or tune with method='full'"
        )


def weight_changes(tuned: Tuned) -> dict[str, Tensor]:
    """By place (`layers.3.gate`): what LoRA adds, (alpha / r) B A; or in full tuning the new weight itself."""
    found = {}
    for name, value in tuned.trained.items():
        parts = re.search(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.(.+)$", name)
        if parts is None:
            raise ValueError(
                f"received a trained tensor {name!r}, which is no linear map of a block; tune the arm again"
            )
        place = f"layers.{parts[1]}.{parts[2]}"
        if parts[3] == "weight":
            found[place] = value
        elif parts[3] == "lora_B.weight":
            found[place] = SCALE * value @ tuned.trained[name.replace("lora_B", "lora_A")]
    return found


def write_adapter(tuned: Tuned, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Write an arm for other tools: a LoRA adapter in peft's format, or the trained tensors as `model.safetensors`.

    Args:
        tuned: the arm.
        folder: where to; it must not be there.
        base: name or folder of the base model that peft should load; by default where the model came from.

    Raises:
        FileExistsError: the folder is there already.
        ValueError: an arm that trained nothing.
    """
    from safetensors.torch import save_file

    if not tuned.trained:
        raise ValueError(f"received the arm {tuned.arm.name!r}, which trained nothing; there is no adapter to write")
    place = Path(folder)
    place.mkdir(parents=True)
    if tuned.arm.method == "full":
        save_file(dict(tuned.trained), place / "model.safetensors", metadata={"format": "pt"})
        return place
    require_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig

        names = [name.removesuffix(".lora_A.weight") for name in tuned.trained if name.endswith(".lora_A.weight")]
        ranks = {name: tuned.trained[f"{name}.lora_A.weight"].shape[0] for name in names}
        config = LoraConfig(
            target_modules=names,
            rank_pattern=ranks,
            alpha_pattern={name: SCALE * rank for name, rank in ranks.items()},
            task_type="CAUSAL_LM",
            base_model_name_or_path=base or tuned.provenance.source,
            inference_mode=True,
        )
        config.save_pretrained(str(place))
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in tuned.trained.items()}
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    return place
