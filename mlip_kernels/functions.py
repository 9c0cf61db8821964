"""Every operator as a ``torch.autograd.Function``: ``functions.DCT.apply(x, 2, (14, 14), "ortho", 1)``.

``apply`` takes what the public function of the operator takes, by position; each class says which. It checks, records
and traces as that function does, whose documentation has the shapes, dtypes and errors.
"""

from mlip_kernels.contrastive.pair_cross_entropy import PairCrossEntropy
from mlip_kernels.contrastive.token_logits import TokenLogits
from mlip_kernels.merging.match import MatchTokens
from mlip_kernels.merging.merge import MergeTokens, UnmergeTokens
from mlip_kernels.merging.weighted_mean import WeightedMean
from mlip_kernels.spectral.amplitude_phase import AmplitudePhase
from mlip_kernels.spectral.dct import DCT, InverseDCT
from mlip_kernels.spectral.energy import BandEnergy, TokenEnergy
from mlip_kernels.spectral.filter import SpectralFilter
from mlip_kernels.spectral.resize import SpectralResize
from mlip_kernels.spectral.rfft import RFFT, InverseRFFT

__all__ = [
    "DCT",
    "RFFT",
    "AmplitudePhase",
    "BandEnergy",
    "InverseDCT",
    "InverseRFFT",
    "MatchTokens",
    "MergeTokens",
    "PairCrossEntropy",
    "SpectralFilter",
    "SpectralResize",
    "TokenEnergy",
    "TokenLogits",
    "UnmergeTokens",
    "WeightedMean",
]
