"""Building blocks for sequential deep generative models (state-space VAEs) on PyTorch and Pyro."""

from seqdisent._heads import NormalHead
from seqdisent._masking import overwrite_padding
from seqdisent.decoders import ConvDecoder, MixtureOfExpertsConvDecoder
from seqdisent.distributions import MarkovChain
from seqdisent.elbo import DecomposedELBO, ELBOTerms, elbo_terms
from seqdisent.encoders import ConvEncoder, Seq2SeqDynamicsEncoder, StaticEncoder
from seqdisent.experts import MixtureOfExperts
from seqdisent.interventions import forecast, generate, infer, reconstruct, swap
from seqdisent.recurrent import RecurrentChain, read_backward
from seqdisent.schedules import AnnealingSchedule
from seqdisent.transitions import Combiner, GatedTransition

__all__ = [
    "AnnealingSchedule",
    "Combiner",
    "ConvDecoder",
    "ConvEncoder",
    "DecomposedELBO",
    "ELBOTerms",
    "GatedTransition",
    "MarkovChain",
    "MixtureOfExperts",
    "MixtureOfExpertsConvDecoder",
    "NormalHead",
    "RecurrentChain",
    "Seq2SeqDynamicsEncoder",
    "StaticEncoder",
    "elbo_terms",
    "forecast",
    "generate",
    "infer",
    "overwrite_padding",
    "read_backward",
    "reconstruct",
    "swap",
]
