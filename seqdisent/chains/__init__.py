"""Whole trajectories as distributions: chains of vectors or classes, beside a recurrent network, independent steps."""

from seqdisent.chains.draws import Draw
from seqdisent.chains.factorised import IndependentSteps
from seqdisent.chains.hidden_emission import HiddenMarkovEmission
from seqdisent.chains.hidden_markov import ClassMarginals, FilteredClasses, HiddenMarkovChain
from seqdisent.chains.linear_gaussian import Filtered, LinearEmission, LinearGaussianChain, Moments
from seqdisent.chains.markov import MarkovChain
from seqdisent.chains.overshooting import OvershootingChain
from seqdisent.chains.protocol import Chain, ChainState, Conditionals
from seqdisent.chains.recurrent import RecurrentChain, feedback, shift_steps
from seqdisent.chains.switching import SwitchingChain

__all__ = [
    "Chain",
    "ChainState",
    "ClassMarginals",
    "Conditionals",
    "Draw",
    "Filtered",
    "FilteredClasses",
    "HiddenMarkovChain",
    "HiddenMarkovEmission",
    "IndependentSteps",
    "LinearEmission",
    "LinearGaussianChain",
    "MarkovChain",
    "Moments",
    "OvershootingChain",
    "RecurrentChain",
    "SwitchingChain",
    "feedback",
    "shift_steps",
]
