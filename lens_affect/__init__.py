"""A TransformerLens-based mechanistic toolkit for emotion in language models.

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens_affect.ablations import Ablation as Ablation
    from lens_affect.ablations import ablate_modules as ablate_modules
    from lens_affect.ablations import mean_outputs as mean_outputs
    from lens_affect.activations import Activations as Activations
    from lens_affect.activations import extract_activations as extract_activations
    from lens_affect.activations import extract_poolings as extract_poolings
    from lens_affect.advice import Recommendation as Recommendation
    from lens_affect.advice import recommend as recommend
    from lens_affect.anisotropy import Anisotropy as Anisotropy
    from lens_affect.anisotropy import measure_anisotropy as measure_anisotropy
    from lens_affect.arms import Arm as Arm
    from lens_affect.arms import plan_arm as plan_arm
    from lens_affect.attribution import DirectAttribution as DirectAttribution
    from lens_affect.attribution import attribute_direction as attribute_direction
    from lens_affect.axes import AxisAgreement as AxisAgreement
    from lens_affect.axes import valence_arousal as valence_arousal
    from lens_affect.boundaries import Onsets as Onsets
    from lens_affect.boundaries import RegimeBoundaries as RegimeBoundaries
    from lens_affect.boundaries import compare_onsets as compare_onsets
    from lens_affect.boundaries import find_boundaries as find_boundaries
    from lens_affect.boundaries import locate_boundaries as locate_boundaries
    from lens_affect.catalogue import CATALOGUE as CATALOGUE
    from lens_affect.checkpoint_pairs import CheckpointPair as CheckpointPair
    from lens_affect.checkpoint_pairs import open_pair as open_pair
    from lens_affect.checkpoints import Checkpoint as Checkpoint
    from lens_affect.checkpoints import open_checkpoint as open_checkpoint
    from lens_affect.comparison import MethodComparison as MethodComparison
    from lens_affect.comparison import compare_methods as compare_methods
    from lens_affect.contrasts import ContrastPairs as ContrastPairs
    from lens_affect.contrasts import load_pairs as load_pairs
    from lens_affect.crosslingual import ScriptComparison as ScriptComparison
    from lens_affect.crosslingual import ScriptTable as ScriptTable
    from lens_affect.crosslingual import script_entanglement as script_entanglement
    from lens_affect.damage import EqualDamage as EqualDamage
    from lens_affect.damage import equal_damage as equal_damage
    from lens_affect.damage import neutral_loss as neutral_loss
    from lens_affect.delta_agreement import DeltaAgreement as DeltaAgreement
    from lens_affect.delta_plans import DeltaPlan as DeltaPlan
    from lens_affect.delta_plans import plan_delta as plan_delta
    from lens_affect.deltas import ModuleDelta as ModuleDelta
    from lens_affect.deltas import compare_modules as compare_modules
    from lens_affect.doses import DoseResponse as DoseResponse
    from lens_affect.doses import sweep_strengths as sweep_strengths
    from lens_affect.effects import effect_sizes as effect_sizes
    from lens_affect.effects import equivalence as equivalence
    from lens_affect.effects import mann_whitney as mann_whitney
    from lens_affect.effects import paired_tests as paired_tests
    from lens_affect.gate import GateVerdict as GateVerdict
    from lens_affect.gate import judge_gate as judge_gate
    from lens_affect.generation import Generated as Generated
    from lens_affect.generation import Intervention as Intervention
    from lens_affect.generation import generate as generate
    from lens_affect.geometry import GeometryAgreement as GeometryAgreement
    from lens_affect.geometry import compare_geometry as compare_geometry
    from lens_affect.geometry import emotion_rdm as emotion_rdm
    from lens_affect.gradients import agreement as agreement
    from lens_affect.gradients import approximate_patches as approximate_patches
    from lens_affect.inside import InsideOutside as InsideOutside
    from lens_affect.inside import correlate_inside as correlate_inside
    from lens_affect.judgements import Judgement as Judgement
    from lens_affect.judgements import can_name as can_name
    from lens_affect.judgements import judge_agreement as judge_agreement
    from lens_affect.judgements import judge_names as judge_names
    from lens_affect.judgements import judge_texts as judge_texts
    from lens_affect.judges import Judge as Judge
    from lens_affect.judges import load_judge as load_judge
    from lens_affect.labelled_texts import load_labelled_texts as load_labelled_texts
    from lens_affect.landing import Landing as Landing
    from lens_affect.landing import measure_landing as measure_landing
    from lens_affect.languages import TransferTable as TransferTable
    from lens_affect.languages import language_transfer as language_transfer
    from lens_affect.lexical import LexicalBar as LexicalBar
    from lens_affect.lexical import lexical_bar as lexical_bar
    from lens_affect.localization import LocalizationCurve as LocalizationCurve
    from lens_affect.localization import localize as localize
    from lens_affect.meaning import MeaningTable as MeaningTable
    from lens_affect.meaning import foreign_meaning as foreign_meaning
    from lens_affect.meaning import load_emotion_words as load_emotion_words
    from lens_affect.models import load_model as load_model
    from lens_affect.module_claims import judge_efficiency as judge_efficiency
    from lens_affect.module_study import ModuleStudy as ModuleStudy
    from lens_affect.module_study import necessity_sufficiency_efficiency as necessity_sufficiency_efficiency
    from lens_affect.module_study import scan_bands as scan_bands
    from lens_affect.module_study import study_modules as study_modules
    from lens_affect.module_table import LearningCurves as LearningCurves
    from lens_affect.module_table import ModuleTable as ModuleTable
    from lens_affect.module_table import compare_arms as compare_arms
    from lens_affect.module_table import learning_curves as learning_curves
    from lens_affect.module_table import load_runs as load_runs
    from lens_affect.neurons import NeuronTable as NeuronTable
    from lens_affect.neurons import top_neurons as top_neurons
    from lens_affect.part_scores import PartScores as PartScores
    from lens_affect.part_scores import join_parts as join_parts
    from lens_affect.part_scores import score_parts as score_parts
    from lens_affect.patching import PatchingMap as PatchingMap
    from lens_affect.patching import patch_sites as patch_sites
    from lens_affect.plotting import plot_anisotropy as plot_anisotropy
    from lens_affect.plotting import plot_curves as plot_curves
    from lens_affect.plotting import plot_emotions as plot_emotions
    from lens_affect.plotting import plot_methods as plot_methods
    from lens_affect.plotting import plot_reliability as plot_reliability
    from lens_affect.plotting import plot_similarity as plot_similarity
    from lens_affect.plotting import plot_valence_arousal as plot_valence_arousal
    from lens_affect.plotting_modules import plot_delta as plot_delta
    from lens_affect.plotting_modules import plot_parts as plot_parts
    from lens_affect.plotting_modules import plot_selectivity as plot_selectivity
    from lens_affect.plotting_patching import plot_patching as plot_patching
    from lens_affect.plotting_patching import plot_positions as plot_positions
    from lens_affect.plotting_patching import plot_siblings as plot_siblings
    from lens_affect.plotting_steering import plot_boundaries as plot_boundaries
    from lens_affect.plotting_steering import plot_dose as plot_dose
    from lens_affect.plotting_steering import plot_inside as plot_inside
    from lens_affect.plotting_steering import plot_judged as plot_judged
    from lens_affect.plotting_steering import plot_languages as plot_languages
    from lens_affect.plotting_steering import plot_onsets as plot_onsets
    from lens_affect.plotting_steering import plot_regimes as plot_regimes
    from lens_affect.plotting_steering import plot_scripts as plot_scripts
    from lens_affect.plotting_steering import plot_verification as plot_verification
    from lens_affect.plotting_tuning import plot_gains as plot_gains
    from lens_affect.plotting_tuning import plot_learning as plot_learning
    from lens_affect.plotting_tuning import plot_retention as plot_retention
    from lens_affect.projections import LayerProjections as LayerProjections
    from lens_affect.projections import projection_by_layer as projection_by_layer
    from lens_affect.protocols import extract_protocol as extract_protocol
    from lens_affect.protocols import write_protocol_stories as write_protocol_stories
    from lens_affect.regimes import RegimeMap as RegimeMap
    from lens_affect.regimes import Thresholds as Thresholds
    from lens_affect.regimes import classify_regimes as classify_regimes
    from lens_affect.regimes import run_jeong_regime as run_jeong_regime
    from lens_affect.repetition import repetition_share as repetition_share
    from lens_affect.report import write_report as write_report
    from lens_affect.reported import check_effect_size as check_effect_size
    from lens_affect.results import Provenance as Provenance
    from lens_affect.scenarios import Scenarios as Scenarios
    from lens_affect.scenarios import load_scenarios as load_scenarios
    from lens_affect.scorecard import Scorecard as Scorecard
    from lens_affect.scorecard import make_scorecard as make_scorecard
    from lens_affect.scorecard import module_scorecard as module_scorecard
    from lens_affect.scorecard import steering_scorecard as steering_scorecard
    from lens_affect.scores import SCORES as SCORES
    from lens_affect.scoring import score_texts as score_texts
    from lens_affect.scripts import script_shares as script_shares
    from lens_affect.scripts import text_languages as text_languages
    from lens_affect.selectivity import AblationTable as AblationTable
    from lens_affect.selectivity import scan_ablations as scan_ablations
    from lens_affect.selfchecks import CheckReport as CheckReport
    from lens_affect.selfchecks import check_model as check_model
    from lens_affect.shapes import CurveShape as CurveShape
    from lens_affect.shapes import curve_shape as curve_shape
    from lens_affect.sites import SITES as SITES
    from lens_affect.sites import Site as Site
    from lens_affect.sites import resolve_site as resolve_site
    from lens_affect.sizes import count_parameters as count_parameters
    from lens_affect.steering import Push as Push
    from lens_affect.steering import make_push as make_push
    from lens_affect.steering import residual_norms as residual_norms
    from lens_affect.steering import steer as steer
    from lens_affect.steering_study import SteeringStudy as SteeringStudy
    from lens_affect.steering_study import study_steering as study_steering
    from lens_affect.stimuli import EMOTIONS as EMOTIONS
    from lens_affect.stimuli import Stimuli as Stimuli
    from lens_affect.stimuli import load_prompts as load_prompts
    from lens_affect.stimuli import load_stimuli as load_stimuli
    from lens_affect.stories import Stories as Stories
    from lens_affect.stories import write_stories as write_stories
    from lens_affect.study import load_study as load_study
    from lens_affect.study import run_study as run_study
    from lens_affect.style import save_figure as save_figure
    from lens_affect.sweeps import Sweep as Sweep
    from lens_affect.sweeps import SweepSpec as SweepSpec
    from lens_affect.sweeps import load_sweep as load_sweep
    from lens_affect.sweeps import make_spec as make_spec
    from lens_affect.sweeps import run_sweep as run_sweep
    from lens_affect.task_metrics import TaskMetrics as TaskMetrics
    from lens_affect.task_metrics import Wheels as Wheels
    from lens_affect.task_metrics import hit_rate as hit_rate
    from lens_affect.task_metrics import load_wheels as load_wheels
    from lens_affect.task_metrics import measure_task as measure_task
    from lens_affect.task_metrics import set_scores as set_scores
    from lens_affect.tasks import Task as Task
    from lens_affect.tasks import TaskScores as TaskScores
    from lens_affect.tasks import load_task as load_task
    from lens_affect.trainable import tuned_weights as tuned_weights
    from lens_affect.transfers import Transfer as Transfer
    from lens_affect.transfers import revert_modules as revert_modules
    from lens_affect.transfers import transfer_modules as transfer_modules
    from lens_affect.tuned import Tuned as Tuned
    from lens_affect.tuned import write_adapter as write_adapter
    from lens_affect.tuning import NoRateError as NoRateError
    from lens_affect.tuning import choose_rate as choose_rate
    from lens_affect.tuning import run_arms as run_arms
    from lens_affect.tuning import tune_module as tune_module
    from lens_affect.tuning_plans import TuningPlan as TuningPlan
    from lens_affect.tuning_plans import plan_tuning as plan_tuning
    from lens_affect.vectors import EmotionVectors as EmotionVectors
    from lens_affect.vectors import fit_vectors as fit_vectors
    from lens_affect.verification import Verification as Verification
    from lens_affect.verification import verify_steering as verify_steering
    from lens_affect.views import TokenView as TokenView
    from lens_affect.views import circuitsvis_view as circuitsvis_view
    from lens_affect.views import view_tokens as view_tokens

_HOME = {
    "Ablation": "ablations",
    "AblationTable": "selectivity",
    "Activations": "activations",
    "Anisotropy": "anisotropy",
    "Arm": "arms",
    "AxisAgreement": "axes",
    "CATALOGUE": "catalogue",
    "CheckReport": "selfchecks",
    "Checkpoint": "checkpoints",
    "CheckpointPair": "checkpoint_pairs",
    "ContrastPairs": "contrasts",
    "CurveShape": "shapes",
    "DeltaAgreement": "delta_agreement",
    "DeltaPlan": "delta_plans",
    "DirectAttribution": "attribution",
    "DoseResponse": "doses",
    "EMOTIONS": "stimuli",
    "EmotionVectors": "vectors",
    "EqualDamage": "damage",
    "GateVerdict": "gate",
    "Generated": "generation",
    "GeometryAgreement": "geometry",
    "InsideOutside": "inside",
    "Intervention": "generation",
    "Judge": "judges",
    "Judgement": "judgements",
    "Landing": "landing",
    "LayerProjections": "projections",
    "LearningCurves": "module_table",
    "LexicalBar": "lexical",
    "LocalizationCurve": "localization",
    "MeaningTable": "meaning",
    "MethodComparison": "comparison",
    "ModuleDelta": "deltas",
    "ModuleStudy": "module_study",
    "ModuleTable": "module_table",
    "NeuronTable": "neurons",
    "Onsets": "boundaries",
    "NoRateError": "tuning",
    "PartScores": "part_scores",
    "PatchingMap": "patching",
    "Provenance": "results",
    "Push": "steering",
    "Recommendation": "advice",
    "RegimeBoundaries": "boundaries",
    "RegimeMap": "regimes",
    "SCORES": "scores",
    "SITES": "sites",
    "Scenarios": "scenarios",
    "Scorecard": "scorecard",
    "ScriptComparison": "crosslingual",
    "ScriptTable": "crosslingual",
    "Site": "sites",
    "SteeringStudy": "steering_study",
    "Stimuli": "stimuli",
    "Stories": "stories",
    "Sweep": "sweeps",
    "SweepSpec": "sweeps",
    "Task": "tasks",
    "TaskMetrics": "task_metrics",
    "TaskScores": "tasks",
    "Thresholds": "regimes",
    "TokenView": "views",
    "Transfer": "transfers",
    "TransferTable": "languages",
    "Tuned": "tuned",
    "TuningPlan": "tuning_plans",
    "Verification": "verification",
    "Wheels": "task_metrics",
    "ablate_modules": "ablations",
    "agreement": "gradients",
    "approximate_patches": "gradients",
    "attribute_direction": "attribution",
    "can_name": "judgements",
    "check_effect_size": "reported",
    "check_model": "selfchecks",
    "choose_rate": "tuning",
    "circuitsvis_view": "views",
    "classify_regimes": "regimes",
    "compare_arms": "module_table",
    "compare_geometry": "geometry",
    "compare_methods": "comparison",
    "compare_modules": "deltas",
    "compare_onsets": "boundaries",
    "correlate_inside": "inside",
    "count_parameters": "sizes",
    "curve_shape": "shapes",
    "effect_sizes": "effects",
    "emotion_rdm": "geometry",
    "equal_damage": "damage",
    "equivalence": "effects",
    "extract_activations": "activations",
    "extract_poolings": "activations",
    "extract_protocol": "protocols",
    "find_boundaries": "boundaries",
    "fit_vectors": "vectors",
    "foreign_meaning": "meaning",
    "generate": "generation",
    "hit_rate": "task_metrics",
    "join_parts": "part_scores",
    "judge_agreement": "judgements",
    "judge_efficiency": "module_claims",
    "judge_gate": "gate",
    "judge_names": "judgements",
    "judge_texts": "judgements",
    "language_transfer": "languages",
    "learning_curves": "module_table",
    "lexical_bar": "lexical",
    "load_emotion_words": "meaning",
    "load_judge": "judges",
    "load_labelled_texts": "labelled_texts",
    "load_model": "models",
    "load_pairs": "contrasts",
    "load_prompts": "stimuli",
    "load_runs": "module_table",
    "load_scenarios": "scenarios",
    "load_stimuli": "stimuli",
    "load_study": "study",
    "load_sweep": "sweeps",
    "load_task": "tasks",
    "load_wheels": "task_metrics",
    "localize": "localization",
    "locate_boundaries": "boundaries",
    "make_push": "steering",
    "make_scorecard": "scorecard",
    "make_spec": "sweeps",
    "mann_whitney": "effects",
    "mean_outputs": "ablations",
    "measure_anisotropy": "anisotropy",
    "measure_landing": "landing",
    "measure_task": "task_metrics",
    "module_scorecard": "scorecard",
    "necessity_sufficiency_efficiency": "module_study",
    "neutral_loss": "damage",
    "open_checkpoint": "checkpoints",
    "open_pair": "checkpoint_pairs",
    "paired_tests": "effects",
    "patch_sites": "patching",
    "plan_arm": "arms",
    "plan_delta": "delta_plans",
    "plan_tuning": "tuning_plans",
    "plot_anisotropy": "plotting",
    "plot_boundaries": "plotting_steering",
    "plot_curves": "plotting",
    "plot_delta": "plotting_modules",
    "plot_dose": "plotting_steering",
    "plot_emotions": "plotting",
    "plot_gains": "plotting_tuning",
    "plot_inside": "plotting_steering",
    "plot_judged": "plotting_steering",
    "plot_languages": "plotting_steering",
    "plot_learning": "plotting_tuning",
    "plot_methods": "plotting",
    "plot_onsets": "plotting_steering",
    "plot_parts": "plotting_modules",
    "plot_patching": "plotting_patching",
    "plot_positions": "plotting_patching",
    "plot_regimes": "plotting_steering",
    "plot_reliability": "plotting",
    "plot_retention": "plotting_tuning",
    "plot_scripts": "plotting_steering",
    "plot_selectivity": "plotting_modules",
    "plot_siblings": "plotting_patching",
    "plot_similarity": "plotting",
    "plot_valence_arousal": "plotting",
    "plot_verification": "plotting_steering",
    "projection_by_layer": "projections",
    "recommend": "advice",
    "repetition_share": "repetition",
    "residual_norms": "steering",
    "resolve_site": "sites",
    "revert_modules": "transfers",
    "run_arms": "tuning",
    "run_jeong_regime": "regimes",
    "run_study": "study",
    "run_sweep": "sweeps",
    "save_figure": "style",
    "scan_ablations": "selectivity",
    "scan_bands": "module_study",
    "score_parts": "part_scores",
    "score_texts": "scoring",
    "script_entanglement": "crosslingual",
    "script_shares": "scripts",
    "set_scores": "task_metrics",
    "steer": "steering",
    "steering_scorecard": "scorecard",
    "study_modules": "module_study",
    "study_steering": "steering_study",
    "sweep_strengths": "doses",
    "text_languages": "scripts",
    "top_neurons": "neurons",
    "transfer_modules": "transfers",
    "tune_module": "tuning",
    "tuned_weights": "trainable",
    "valence_arousal": "axes",
    "verify_steering": "verification",
    "view_tokens": "views",
    "write_adapter": "tuned",
    "write_protocol_stories": "protocols",
    "write_report": "report",
    "write_stories": "stories",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll] - a list of strings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"lens_affect has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"lens_affect.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
