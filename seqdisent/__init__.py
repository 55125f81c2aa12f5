"""Building blocks for sequential deep generative models (state-space VAEs) on PyTorch and Pyro."""

from seqdisent.chains import (
    HiddenMarkovChain,
    HiddenMarkovEmission,
    IndependentSteps,
    LinearGaussianChain,
    MarkovChain,
    OvershootingChain,
    RecurrentChain,
    SwitchingChain,
    feedback,
    shift_steps,
)
from seqdisent.decoders import ConvDecoder, MixtureOfExpertsConvDecoder
from seqdisent.encoders import ConvEncoder, Seq2SeqDynamicsEncoder, StaticEncoder, read_backward
from seqdisent.experts import MixtureOfExperts
from seqdisent.heads import NormalHead
from seqdisent.inference import (
    DecomposedELBO,
    ELBOTerms,
    batch_sizes,
    elbo_terms,
    forecast,
    generate,
    impute,
    infer,
    reconstruct,
    swap,
)
from seqdisent.masks import fill_padding, mark_missing, overwrite_padding, steps_after
from seqdisent.priors import FlowPrior, MixturePrior, VampPrior
from seqdisent.schedules import AnnealingSchedule
from seqdisent.transitions import Combiner, GatedTransition, OrnsteinUhlenbeckTransition
from seqdisent.zoo import load

__all__ = [
    "AnnealingSchedule",
    "Combiner",
    "ConvDecoder",
    "ConvEncoder",
    "DecomposedELBO",
    "ELBOTerms",
    "FlowPrior",
    "GatedTransition",
    "HiddenMarkovChain",
    "HiddenMarkovEmission",
    "IndependentSteps",
    "LinearGaussianChain",
    "MarkovChain",
    "MixtureOfExperts",
    "MixtureOfExpertsConvDecoder",
    "MixturePrior",
    "NormalHead",
    "OrnsteinUhlenbeckTransition",
    "OvershootingChain",
    "RecurrentChain",
    "Seq2SeqDynamicsEncoder",
    "StaticEncoder",
    "SwitchingChain",
    "VampPrior",
    "batch_sizes",
    "elbo_terms",
    "feedback",
    "fill_padding",
    "forecast",
    "generate",
    "impute",
    "infer",
    "load",
    "mark_missing",
    "overwrite_padding",
    "read_backward",
    "reconstruct",
    "shift_steps",
    "steps_after",
    "swap",
]
