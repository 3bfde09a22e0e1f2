"""What an adapter is, whichever layer holds it: A, B and a scale, and the change of weight that they stand for."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.svd import low_rank


class LowRankUpdate(nn.Module):
    """A holder of an adapter: mixed into an adapted layer, or standing beside a parameter.

    A weight is seen as a matrix W of shape (out, in); `lora_matrix` and `lora_from_matrix` say how. Then `lora_A` is of
    shape (r, in), `lora_B` of shape (out, r), and the weight in effect is, with s for `lora_scaling`,

        W + s B A                              LoRA (https://arxiv.org/abs/2106.09685, equation 3)
        W + s (B A - B0 A0)                    with the factors' beginnings kept (PiSSA)
        m (W + s B A) / ||W + s B A||          with m for `lora_magnitude_vector` (DoRA), the norm row by row

    Layers become adapted through `attach`, never by construction. Whatever a layer has gained by it begins with `lora_`, so
    that no name of a user's own class is hidden.
    """

    lora_name_A = "lora_A"
    lora_name_B = "lora_B"

    lora_scaling: float
    lora_dropout: float
    lora_active: bool
    lora_A_initial: Tensor
    lora_B_initial: Tensor
    lora_gate: Tensor
    """1 while the adapter is active, else 0: for compiled code, which a Python flag would have compiled twice."""

    def lora_adapt(self, weight: Tensor, rank: int, scaling: float, config: LoRAConfig) -> None:
        """Adds a fresh adapter for `weight`.

        The adapter is drawn on the CPU, so that a seed gives the same one on every device, and kept in float32
        over a base of lower precision.
        """
        self.lora_scaling = scaling
        self.lora_dropout = config.dropout
        self.lora_active = True
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("lora_gate", torch.ones((), dtype=dtype, device=weight.device), persistent=False)
        if config.init == "pissa":
            up, down = low_rank(self.lora_matrix(dense(weight.detach()).to(dtype)), rank)
            down, up = self.lora_shaped(down / scaling**0.5, up / scaling**0.5, weight)
            self.register_buffer("lora_A_initial", down.clone())
            self.register_buffer("lora_B_initial", up.clone())
        else:
            out_features, in_features = self.lora_matrix_shape(weight)
            blank = torch.empty(rank, in_features, dtype=dtype), torch.zeros(out_features, rank, dtype=dtype)
            down, up = self.lora_shaped(*blank, weight)
            if config.init == "gaussian":
                nn.init.normal_(down, std=1 / rank)
            else:
                self.lora_fill_kaiming(down)
        self.register_parameter(self.lora_name_A, nn.Parameter(down.to(weight.device)))
        self.register_parameter(self.lora_name_B, nn.Parameter(up.to(weight.device)))
        if config.dora:
            self.lora_magnitude_vector = nn.Parameter(
                self._lora_row_norms(weight).view(self.lora_magnitude_shape(weight))
            )

    def lora_fill_kaiming(self, down: Tensor) -> None:
        """Draws A uniformly, with a variance that goes by the number of inputs."""
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    @staticmethod
    def lora_matrix(weight: Tensor) -> Tensor:
        """The weight as a matrix of shape (out, in)."""
        return weight.flatten(1)

    @staticmethod
    def lora_from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
        """A matrix of shape (out, in) in the weight's own shape."""
        return matrix.view(weight.shape)

    @classmethod
    def lora_matrix_shape(cls, weight: Tensor) -> tuple[int, int]:
        """`(out, in)`."""
        out_features, in_features = cls.lora_matrix(torch.empty(weight.shape, device="meta")).shape
        return out_features, in_features

    @staticmethod
    def lora_shaped(down: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices A and B in the shapes that the layer keeps them in."""
        return down, up

    @classmethod
    def lora_magnitude_shape(cls, weight: Tensor) -> tuple[int, ...]:
        """Of DoRA's m."""
        return (cls.lora_matrix_shape(weight)[0],)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A and B such that s B A is the update, in their own shapes.

        Of PiSSA, B A - B0 A0 = (B - B0) A + B0 (A - A0): twice the rank, and exactly zero in the beginning.
        """
        parameters, buffers = self._parameters, self._buffers
        down, up = parameters[self.lora_name_A], parameters[self.lora_name_B]
        assert down is not None
        assert up is not None
        if "lora_A_initial" not in buffers:
            return down, up
        down_initial, up_initial = self.lora_A_initial, self.lora_B_initial
        return torch.cat((down, down - down_initial)), torch.cat((up - up_initial, up_initial), dim=1)

    @property
    def lora_rank(self) -> int:
        """The rank r of the update."""
        down = self._parameters[self.lora_name_A]
        assert down is not None
        return down.shape[0]

    def lora_delta(self, weight: Tensor) -> Tensor:
        """ΔW = s B A, of the weight's shape, in the adapter's precision."""
        down, up = self.lora_factors()
        with _full_precision(down.device.type):
            return self.lora_from_matrix((up.flatten(1) @ down.flatten(1)) * self.lora_scaling, weight)

    def lora_weight_in_effect(self, weight: Tensor) -> Tensor:
        """What stands for `weight` with the adapter: formed in the adapter's precision, rounded once to the weight's."""
        delta = self.lora_delta(weight)
        full = dense(weight).to(delta.dtype) + delta
        if "lora_magnitude_vector" in self._parameters:
            full = self.lora_from_matrix(self.lora_matrix(full) * self.lora_dora_ratio(weight)[:, None], weight)
        return full.to(weight.dtype)

    def lora_dora_ratio(self, weight: Tensor) -> Tensor:
        """What DoRA scales each row by, m / ||W + s B A||, of shape (out,).

        The norm is a constant to the gradient (DoRA, section 4.3).
        """
        norms, magnitude = self._lora_row_norms(weight), self.lora_magnitude_vector.view(-1)
        return torch.where(norms > 0, magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1)

    @torch.no_grad()
    def _lora_row_norms(self, weight: Tensor) -> Tensor:
        """||W + s B A||, row by row, without forming B A.

        ||w + s b A||² = ||w||² + 2 s b·(A w) + s² (b A)·(b A), the last as b (A Aᵀ) bᵀ.
        """
        down, up = (factor.detach().flatten(1) for factor in self.lora_factors())
        with _full_precision(down.device.type):
            matrix = self.lora_matrix(dense(weight.detach())).to(down.dtype)
            crossed = matrix @ down.t() * 2 + up @ (down @ down.t()) * self.lora_scaling
            squares = matrix.square().sum(1) + self.lora_scaling * (up * crossed).sum(1)
            return squares.clamp_min(0).sqrt()

    def lora_is_fresh(self) -> bool:
        """Whether the adapter changes nothing yet: B is zero or, by PiSSA, A and B are what they were."""
        down, up = self.get_parameter(self.lora_name_A), self.get_parameter(self.lora_name_B)
        if "lora_B_initial" in self._buffers:
            return torch.equal(up, self.lora_B_initial) and torch.equal(down, self.lora_A_initial)
        return not bool(up.any())

    def lora_take_off(self) -> dict[str, Any]:
        """Removes the adapter and returns it, for `put_on`."""
        taken: dict[str, Any] = {}
        for part in (self._parameters, self._buffers, self.__dict__):
            for key in [key for key in part if key.startswith("lora_")]:
                taken[key] = part.pop(key)
        self._non_persistent_buffers_set.discard("lora_gate")
        return taken

    def lora_put_on(self, taken: dict[str, Any], device: torch.device) -> None:
        """Puts on what `take_off` returned."""
        for key, value in taken.items():
            if isinstance(value, nn.Parameter):
                value.data = value.data.to(device)
                self.register_parameter(key, value)
            elif isinstance(value, Tensor):
                self.register_buffer(key, value.to(device), persistent=key != "lora_gate")
            else:
                setattr(self, key, value)

    def lora_switch(self, active: bool) -> None:
        """Switches the adapter on or off."""
        self.lora_active = active
        # Not as an operation that autograd counts: a compiled backward pass may still be to come.
        self.lora_gate.data.fill_(active)

    def extra_repr(self) -> str:
        own = f"rank={self.lora_rank}, scaling={self.lora_scaling:g}"
        return f"{inherited}, {own}" if (inherited := super().extra_repr()) else own


class ParameterUpdate(LowRankUpdate):
    """The adapter of a parameter that its module reads itself: stands in that module as `lora_<parameter's name>`."""


def is_quantised(weight: Tensor) -> bool:
    """Whether the weight is one of torchao's, which stands for a dense one in fewer bits."""
    return type(weight).__module__.startswith("torchao.")


def dense(weight: Tensor) -> Tensor:
    """The weight, or the one that a quantised weight stands for."""
    return weight.dequantize() if is_quantised(weight) else weight


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Without autocast, which would form ΔW in its lower precision."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
