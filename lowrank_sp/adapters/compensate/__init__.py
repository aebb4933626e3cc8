r"""What a quantizer loses of a weight, made up for by a low-rank correction.

A layer computes with :math:`Q + B A` instead of :math:`W`. The methods differ in the norm in which
they make :math:`W - Q - B A` small, and in what is quantized: the weight, or what a correction
leaves of it. With :math:`E = W - Q` the correction of a method with the norm
:math:`\lVert \cdot\, M \rVert_F` is :math:`U_r U_r^H E`, where :math:`E M = U \Sigma V^H`: nothing
is inverted, and any root :math:`M` of one second moment gives one answer.

``quantize`` is a function from a matrix to anything that multiplies. To correct a base that exists
already, pruned or quantized by any means, pass ``lambda _: base``.
"""

from collections.abc import Callable as _Callable
from typing import NamedTuple as _NamedTuple

from lowrank_sp.adapters.compensate._base import Compensated as Compensated
from lowrank_sp.adapters.compensate._base import Quantizer as Quantizer
from lowrank_sp.adapters.compensate.errors import lorc as lorc
from lowrank_sp.adapters.compensate.errors import lqer as lqer
from lowrank_sp.adapters.compensate.errors import qera as qera
from lowrank_sp.adapters.compensate.errors import qera_approx as qera_approx
from lowrank_sp.adapters.compensate.joint import lq_lora as lq_lora
from lowrank_sp.adapters.compensate.joint import srr as srr
from lowrank_sp.adapters.compensate.joint import svdquant as svdquant


class Compensation(_NamedTuple):
    """A function that compensates, and the keyword under which it takes its data, if it needs any.

    The keyword is also the key of the data in a calibration file, ``<layer>.<statistic>``.
    """

    function: _Callable[..., Compensated]
    statistic: str | None


#: Methods by name, for programs that take a name from their user.
COMPENSATIONS: dict[str, Compensation] = {
    "lorc": Compensation(lorc, None),
    "lqer": Compensation(lqer, "magnitude"),
    "qera_approx": Compensation(qera_approx, "mean_square"),
    "qera": Compensation(qera, "second_moment"),
    "eora": Compensation(qera, "second_moment"),
    "lq_lora": Compensation(lq_lora, "fisher"),
    "srr": Compensation(srr, "second_moment"),
    "svdquant": Compensation(svdquant, None),
}
