"""Building blocks for sequential deep generative models (state-space VAEs) on PyTorch and Pyro."""

from seqdisent.distributions import MarkovChain
from seqdisent.elbo import DecomposedELBO, ELBOTerms, elbo_terms
from seqdisent.encoders import ConvEncoder, Seq2SeqDynamicsEncoder, StaticEncoder
from seqdisent.experts import MixtureOfExperts, MixtureOfExpertsConvDecoder
from seqdisent.interventions import forecast, generate, infer, reconstruct, swap
from seqdisent.schedules import AnnealingSchedule
from seqdisent.transitions import Combiner, GatedTransition

__all__ = [
    "AnnealingSchedule",
    "Combiner",
    "ConvEncoder",
    "DecomposedELBO",
    "ELBOTerms",
    "GatedTransition",
    "MarkovChain",
    "MixtureOfExperts",
    "MixtureOfExpertsConvDecoder",
    "Seq2SeqDynamicsEncoder",
    "StaticEncoder",
    "elbo_terms",
    "forecast",
    "generate",
    "infer",
    "reconstruct",
    "swap",
]
