"""What follows from a model and a guide: the ledger of the bound, a loss for Pyro, interventions by site name."""

from seqdisent.inference.elbo import elbo_terms
from seqdisent.inference.forecasting import forecast
from seqdisent.inference.imputation import Imputed, impute
from seqdisent.inference.information import minibatch_mutual_information
from seqdisent.inference.interventions import Inferred, generate, infer, reconstruct, swap
from seqdisent.inference.programs import batch_sizes
from seqdisent.inference.svi import DecomposedELBO
from seqdisent.inference.terms import ELBOTerms, Term

__all__ = [
    "DecomposedELBO",
    "ELBOTerms",
    "Imputed",
    "Inferred",
    "Term",
    "batch_sizes",
    "elbo_terms",
    "forecast",
    "generate",
    "impute",
    "infer",
    "minibatch_mutual_information",
    "reconstruct",
    "swap",
]
