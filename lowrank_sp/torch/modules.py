"""A linear layer with an adapter: the arrays of a form as parameters, and the forward pass.

:mod:`lowrank_sp.torch.attaching` puts these modules into models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_sp._arrays import to_host
from lowrank_sp.adapters.forms import Form, LayeredForm, Trained, Weight

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

    def products(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, float]]:
        """Products of two factors of its own: the name of ``up``, both factors, and the scale."""
        for up, down in getattr(self.kind, "products", ()):
            if up not in self._links and down not in self._links:
                scale = float(cast(float, self._static.get("scale", 1.0)))
                yield up, getattr(self, up), getattr(self, down), scale

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
    base : torch.nn.Linear, or Conv1D of transformers
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
        """The bias of the base."""
        return cast(Tensor | None, self.base.bias)

    def form(self) -> Form:
        """The form as it is now, of the parameters themselves."""
        return self._form(self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapted layer makes of ``x``."""
        form, dtype = self._form(x.device), self.arrays.dtype
        z = x if x.dtype == dtype else x.to(dtype)
        dropped = self.dropout is not None and self.training
        if self.dropout is not None:
            z = self.dropout(z)
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


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is ``(n, m)``, as in GPT-2."""
    # A module of that type exists only where transformers has been imported.
    library: Any = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a kind known here."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def matrix_of(module: nn.Module) -> Tensor:
    """Weight of a linear layer as a matrix ``(m, n)``; a view."""
    weight = cast(Tensor, module.weight)
    return weight.mT if is_transposed(module) else weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(m, n)`` of a linear layer, whatever its weight is stored as."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    m, n = matrix_of(module).shape
    return m, n


def as_tensor(array: Any, like: Tensor) -> Tensor:
    """A contiguous copy of an array of any library, where ``like`` is, floats in its dtype."""
    tensor = array if isinstance(array, Tensor) else torch.as_tensor(to_host(array))
    dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(
        device=like.device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
    )


def _attribute(name: str) -> str:
    """Name of an array as an attribute: modules allow no dots."""
    return name.replace(".", "_")
