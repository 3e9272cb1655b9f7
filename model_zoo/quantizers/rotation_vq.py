"""VQ with the rotation trick: its gradient is rotated and rescaled (Fifty et al., arXiv 2410.06424), a baseline."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.vq import VectorQuantizer

LARGEST_SCALE = 1e6  # of the gradient; for larger ones the direction of z is hardly more than rounding
OPPOSITE = 1e-4  # |z^ + q^| from which the plane of the rotation is hardly more than rounding


class RotationQuantizer(VectorQuantizer):
    """Selects codes as VQ does, and with the same output and the same loss terms. The gradient reaches the encoder
    through the rotation and rescaling that turn z into its code (section 4.2; see `rotate`), so that the angle between
    gradient and code is that between gradient and z. Straight through, as in VQ, it would not depend on z.

    The paper moves the codes of its VQGANs by the VQ losses, as here, and those of its VQ-VAEs by moving averages
    (appendix A.10).
    """

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        index_n = self.nearest(z_nd)
        code_nd = self.vectors(index_n)
        rotated_nd = rotate(z_nd, code_nd.detach())
        # The value is the code itself, without the rounding of the rotation; the gradient is that of the rotation.
        return IndexBackprop(rotated_nd + (code_nd - rotated_nd).detach(), index_n, None, None, code_nd)


def rotate(z_nd: Tensor, code_nd: Tensor) -> Tensor:
    """The rotation trick (section 4.2), ``lambda (z - 2 r r^T z + 2 q^ z^^T z)`` for each token z with code q.

    z^ = z / |z|, q^ = q / |q|, r = (z^ + q^) / |z^ + q^|, lambda = |q| / |z|. Everything but z is a constant (appendix
    A.7), so the gradient with respect to z is lambda R^T times that of the output. The published VQGAN code instead
    multiplies R by z / |z| and differentiates |z|; the paper's formula is used here.

    The paper leaves degenerate cases open. They are, here:
    lambda above 1e6, which includes z = 0: the gradient is straight-through.
    q = 0: lambda is 0, and so is the gradient.
    q^ = -z^: every rotation by pi in a plane that contains z turns z into q. The limit of the formula as r vanishes is
    used, I - 2 q^ q^^T, which reverses the component along z and keeps the others. Within 1e-4 of that case r shrinks
    towards 0 with z^ + q^, so that the gradient stays continuous and bounded.
    """
    with torch.no_grad():
        z_norm_n1, code_norm_n1 = (x_nd.norm(dim=1, keepdim=True) for x_nd in (z_nd, code_nd))
        tiny_n1 = z_norm_n1 * LARGEST_SCALE <= code_norm_n1
        scale_n1 = code_norm_n1 / torch.where(tiny_n1, 1, z_norm_n1)
        from_nd = z_nd / torch.where(tiny_n1, 1, z_norm_n1)
        to_nd = code_nd / torch.where(code_norm_n1 > 0, code_norm_n1, 1)
        middle_nd = F.normalize(from_nd + to_nd, eps=OPPOSITE)
    along_middle_n1 = (middle_nd * z_nd).sum(dim=1, keepdim=True)
    along_z_n1 = (from_nd * z_nd).sum(dim=1, keepdim=True)
    rotated_nd = scale_n1 * (z_nd - 2 * along_middle_n1 * middle_nd + 2 * along_z_n1 * to_nd)
    return torch.where(tiny_n1, z_nd, rotated_nd)
