"""A layer with an adapter: the arrays of a form as parameters, and the forward pass.

:mod:`lowrank_sp.torch.attaching` puts these modules into models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_sp._arrays import to_host
from lowrank_sp.adapters.forms import Form, LayeredForm, Trained, Weight
from lowrank_sp.factors import Factored
from lowrank_sp.torch.layers import convolved, is_convolution, looked_up, matrix_of

AnyForm = TypeVar("AnyForm", Form, LayeredForm)


class Pool(nn.Module):
    """Fixed arrays that several forms have in common, under numbers."""

    def add(self, array: Any, like: Tensor) -> str:
        """Register an array, and return its name."""
        name = str(len(self._buffers))
        self.register_buffer(name, as_tensor(array, like))
        return name


class Shared(nn.ModuleList):
    """What the layers of a model share: it stands at the model itself, and layers refer to it.

    As a step of a ``torch.nn.Sequential`` it does nothing.
    """

    def forward(self, x: Any) -> Any:
        """``x``."""
        return x


class Arrays(nn.Module, Generic[AnyForm]):
    """Arrays of a form: trained ones as parameters, fixed ones as buffers.

    Parameters
    ----------
    form : Form or LayeredForm
        Its arrays are copied; those of the weight are left out.
    like : Tensor
        Of the dtype and on the device that the arrays shall have.
    pool : Pool, optional
        Where arrays are that others have too. It belongs to the model, not to this module.
    links : mapping from str to str, optional
        Names in the pool by names in the form.
    """

    def __init__(
        self,
        form: AnyForm,
        like: Tensor,
        pool: Pool | None = None,
        links: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        roles = form.roles()
        self.kind: type[AnyForm] = type(form)
        self._links = dict(links or {})
        self.__dict__["_pool"] = pool
        self._static = {k: v for k, v in vars(form).items() if k not in roles or v is None}
        self._names: dict[str, str | list[str]] = {}
        for field in roles:
            value = getattr(form, field)
            rows = isinstance(value, tuple)
            names = [f"{field}.{i}" for i in range(len(value))] if rows else field
            if value is not None and roles[field] is not Weight:
                self._names[field] = names
        self._weights = [k for k in form.arrays(Weight) if k in roles]
        factors = {name for pair in getattr(form, "products", ()) for name in pair}
        trained = form.arrays(Trained)
        for name, array in form.arrays().items():
            if roles[name.partition(".")[0]] is not Weight and name not in self._links:
                # A frozen factor of a pair is a parameter, since optimizers of pairs ask for two.
                tensor, attribute = as_tensor(array, like), _attribute(name)
                if name in trained or name in factors:
                    parameter = nn.Parameter(tensor, requires_grad=name in trained)
                    self.register_parameter(attribute, parameter)
                else:
                    self.register_buffer(attribute, tensor)
        self._first = next(iter(trained))

    @property
    def needs_weight(self) -> bool:
        """Whether the update depends on the weight."""
        return bool(self._weights)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the trained arrays."""
        return self._array(self._first, None).dtype

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self._array(self._first, None).device

    def form(self, weight: Tensor | None, device: torch.device | None) -> AnyForm:
        """The form of the arrays as they are now.

        Parameters
        ----------
        weight : Tensor or None
            The weight of the layer, where the update depends on it.
        device : torch.device or None
            Where arrays of the pool shall be.
        """
        values = dict(self._static)
        for field, names in self._names.items():
            if isinstance(names, str):
                values[field] = self._array(names, device)
            else:
                values[field] = tuple([self._array(name, device) for name in names])
        for field in self._weights:
            values[field] = weight
        return self.kind.assembled(values)

    def own(self) -> Iterator[tuple[str, Tensor]]:
        """Arrays that are registered here, under their names in the form."""
        for names in self._names.values():
            for name in [names] if isinstance(names, str) else names:
                if name not in self._links:
                    yield name, self._array(name, None)

    def products(self) -> Iterator[tuple[str, tuple[nn.Parameter, ...], float]]:
        """Products of its own: the name of ``up``, the factors from left to right, the scale."""
        for names in getattr(self.kind, "products", ()):
            if not any(name in self._links for name in names):
                scale = float(cast(float, self._static.get("scale", 1.0)))
                yield names[0], tuple(getattr(self, name) for name in names), scale

    def _array(self, name: str, device: torch.device | None) -> Tensor:
        if name in self._links:
            array = getattr(self.__dict__["_pool"], self._links[name])
            return array if device is None else array.to(device)
        return getattr(self, _attribute(name))


class Adapted(nn.Module):
    """A linear layer, and the form that adapts its weight.

    The layer that was there is ``base``, frozen. The adapter computes in its own dtype, and the
    output has that of the base.

    Parameters
    ----------
    base : torch.nn.Linear, or Conv1D of transformers; other layers have classes of their own
    arrays : Arrays
        Of the form of this layer, or of one form of many layers.
    index : int, optional
        Which of the many layers this is.
    dropout : float
        Probability of dropping an input of the adapter.
    """

    def __init__(
        self, base: nn.Module, arrays: Arrays[Any], index: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base = base
        self.index = index
        if index is None:
            self.adapter = arrays
        else:
            # Not as a submodule: the arrays belong to the model.
            self.__dict__["_shared"] = arrays
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.thawed = [name for name, p in base.named_parameters() if p.requires_grad]
        # Any other structure needs the product of the weight alone, without the bias.
        self.adds = type(self.form()).adapt is Form.adapt

    @property
    def arrays(self) -> Arrays[Any]:
        """Where the arrays of the form are."""
        return self.adapter if self.index is None else self.__dict__["_shared"]

    @property
    def weight(self) -> Tensor:
        """The weight of the base."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base; None where it has none, as embeddings."""
        return cast(Tensor | None, getattr(self.base, "bias", None))

    def form(self) -> Form:
        """The form as it is now, of the parameters themselves."""
        return self._form(self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapted layer makes of ``x``."""
        form, dtype = self._form(x.device), self.arrays.dtype
        dropped = self.dropout is not None and self.training
        z = self._input(x)
        if self.adds:
            y = self.base(x)
            return form.adapt(z, y).to(y.dtype)
        if not dropped:
            product = functional.linear(x, matrix_of(self.base))
            y = form.adapt(z, product)
            return (y if self.bias is None else y + self.bias).to(product.dtype)
        # The base sees all inputs; only what the form changes about it drops some.
        y = self.base(x)
        product = functional.linear(z, matrix_of(self.base).to(dtype))
        return (y + (form.adapt(z, product) - product)).to(y.dtype)

    def _input(self, x: Tensor) -> Tensor:
        """What the adapter sees of ``x``."""
        z = x if x.dtype == self.arrays.dtype else x.to(self.arrays.dtype)
        return z if self.dropout is None else self.dropout(z)

    def _form(self, device: torch.device) -> Form:
        arrays = self.arrays
        if self.index is not None:
            form = arrays.form(None, None).layer(self.index)
            if arrays.device == device:
                return form
            # Layers of one model may be on several devices.
            return form.replace({name: array.to(device) for name, array in form.arrays().items()})
        weight = matrix_of(self.base).to(arrays.dtype) if arrays.needs_weight else None
        return arrays.form(weight, device)


class AdaptedEmbedding(Adapted):
    """An embedding, and the form that adapts its weight: a product of two factors.

    A row of the one is looked up and multiplied by the other. There is no dropout: the input is no
    vector.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The adapted rows of the entries ``x``."""
        y = self.base(x)
        delta = cast(Factored, self._form(y.device).delta())
        return (y + looked_up(self.base, x, delta)).to(y.dtype)


class AdaptedConvolution(Adapted):
    """A convolution, and the form that adapts its weight, channels by unfolded kernels."""

    def forward(self, x: Tensor) -> Tensor:
        """What the adapted convolution makes of ``x``."""
        y = self.base(x)
        delta = self._form(x.device).delta()
        return (y + convolved(self.base, self._input(x), delta)).to(y.dtype)


def adapted(
    base: nn.Module, arrays: Arrays[Any], index: int | None = None, dropout: float = 0.0
) -> Adapted:
    """The module that takes the place of a layer."""
    if isinstance(base, nn.Embedding):
        return AdaptedEmbedding(base, arrays, index)
    kind = AdaptedConvolution if is_convolution(base) else Adapted
    return kind(base, arrays, index, dropout)


def as_tensor(array: Any, like: Tensor) -> Tensor:
    """A contiguous copy of an array of any library, where ``like`` is, floats in its dtype."""
    # Copied at once, for arrays of files are not writable.
    tensor = array if isinstance(array, Tensor) else torch.tensor(to_host(array))
    dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(
        device=like.device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
    )


def _attribute(name: str) -> str:
    """Name of an array as an attribute: modules allow no dots."""
    return name.replace(".", "_")
