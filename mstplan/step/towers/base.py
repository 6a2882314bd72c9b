"""What towers have in common: a writer of operations over an image's patches, and the way into the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ...spec.model import Attention, Mlp, Model
from ...spec.vision import Encoder, Vision
from ..cuda import FLASH_ROWS
from ..layers import Numerics, Writer
from ..recipe import Recipe
from ..roles import Role
from ..selection import Named, WeightKind
from ..tape import BASIS, ForGradients, Op, Part, Tape, TapeWriter, Tensor, Weight, axes_of, tensor_of
from ..workspaces import SortedLookups


class Seen(NamedTuple):
    """What comes of images. embedded: what was embedded of tokens. hidden: the same with features in their places. held: variables until the
    model's code returns; returned: what it returns beside hidden states, which is there until the loss is."""

    embedded: Tensor
    hidden: Tensor
    held: tuple[Tensor, ...] = ()
    returned: tuple[Tensor, ...] = ()


class Section(NamedTuple):
    """A stretch of a tower's code. prefix: what the names of its weights begin with. kind: of the weights. model: its sizes, as of a text model.
    names: of modules, where they have others than a text model's. is_idle: no gradient comes to it."""

    prefix: str
    kind: WeightKind
    model: Model
    names: dict[str, str]
    is_idle: bool = False


class Images:
    """A step's images, while what is done with them is written on the tape of `w`.

    frozen: names of weights of towers that are not trained. several: are there more sequences than one? named: the weights that were
    written, by their names in the whole model; unused: of these, those from which no feature comes. pixels:
    in the weights' dtype, where they are cast before all else.
    """

    def __init__(self, w: Writer, vision: Vision, recipe: Recipe, frozen: frozenset[str], several: bool):
        self.w, self.vision, self.recipe, self.frozen = w, vision, recipe, frozen
        self.count, self.several = recipe.images, several or recipe.images > 1
        self.named: list[Named] = []
        self.unused: list[Named] = []
        self.pixels: tuple[Tensor, ...] = ()
        self._layers: dict[frozenset[str], Tape] = {}

    def writer(self, section: Section, tokens: int, onto: TapeWriter | None = None) -> TowerWriter:
        """A writer of operations over so many tokens of each image. onto: the tape; None: that of the step."""
        return TowerWriter(self, section, tokens, self.w.tape.ops if onto is None else onto.ops)

    def trains(self, kind: WeightKind) -> bool:
        """Whether any weight of a kind that has been written is trained."""
        return any(named.names[0] not in self.frozen for named in self.named if kind in named.kinds)

    def layer(
        self, section: Section, tokens: int, hidden: Tensor, write: Callable[[TowerWriter, Tensor], Tensor]
    ) -> Tensor:
        """A layer, checkpointed where those of text are, as transformers has all its layers that can be (`gradient_checkpointing_enable`)."""
        inner = TowerWriter(self, section, tokens, [])
        write(inner, inner.source())
        tape, frozen = inner.tape.build_tape(), inner.own_frozen()
        tape = self._layers.setdefault(frozen, tape)  # alike layers are one tape
        out = inner.hidden()
        part = Part(tape, recompute=self.recipe.checkpoints_layers)
        self.w.tape.add(
            Op(
                f"layer {section.prefix.split('.')[-2]} of the tower",
                (hidden,),
                (out,),
                part=part,
                stage=self.w.tape.stage,
            )
        )
        return out

    def into_embeddings(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Embeddings with features in place of the tokens that stand for images (masked_scatter).

        from source: aten native/cuda/IndexKernel.cpp: forward holds the mask at full size, and sums of it in int64; the gradient of features
        is taken by the places in the mask, an index for each axis."""
        w, tape, width = self.w, self.w.tape, self.w.model.hidden
        with tape.assign_role(Role.EMBEDDING):
            mask = tape.op("find tokens of images", [], tape.new("tokens of images", w.t, "bool"))
            sums = w.new("mask of images, and its sums", str(9 * width), "uint8")
            places = tape.new("places of images", f"b {self.count * self.vision.tokens} {3 * width}", "int64")
        return tape.op(
            "put images into embeddings",
            [hidden, features, mask],
            w.hidden(),
            keeps=(mask,),
            temps=(sums,),
            grads=((hidden, tape.grad(hidden)), (features, tape.grad(features))),
            for_gradients=ForGradients(back_temps=((places, features),)),
        )


class _TowerTape(TapeWriter):
    """A tape whose tensors say what they are of, and their sizes in numbers: the step's axes mean sizes of text."""

    def __init__(self, label: str, dims: dict[str, int], ops: list[Op]):
        super().__init__(dims)
        self.label, self.ops = f"{label}: ", ops

    def new(self, name: str, shape: str, dtype: str, base: Tensor | None = None, *, cached: bool = False) -> Tensor:
        sizes = " ".join(str(self.dims.get(axis, axis)) for axis in shape.split())
        name = self.label + name.removeprefix(self.label)
        return tensor_of(self.dims, name, sizes, dtype, base, role=self.role, cached=cached)

    def name_kernel(self, kernel: str, start: int, selected: bool) -> None:
        """Of towers a selective checkpoint keeps nothing: they have plain ones (mstplan/train/checkpoint.py, checkpoint_alone)."""
        super().name_kernel(kernel, start, selected=False)


class TowerWriter(Writer):
    """Writes a tower's operations: tokens of all images of a sequence are one axis. copies_rows: hidden states lie so that the numbers of a
    token do not lie together, and norms copy them; copies_gradients: so do gradients that come to them."""

    def __init__(self, images: Images, section: Section, tokens: int, ops: list[Op]):
        outer = images.w
        super().__init__(section.model, _numerics(outer.numerics), f"b {images.count * tokens}", outer.tape.stage)
        self.images, self.section, self.rows = images, section, images.count * tokens
        self.rounded = images.count * (-(-tokens // FLASH_ROWS) * FLASH_ROWS)
        self.tokens = tokens
        self.names = section.names
        self.copies_rows = self.copies_gradients = False
        label = "projector" if section.kind is WeightKind.PROJECTOR else "vision"
        tape = _TowerTape(label, self.tape.dims, ops)
        tape.stage = outer.tape.stage if ops is outer.tape.ops else None
        tape.role = Role.EMBEDDING
        self.tape = tape
        self._own_frozen: set[str] = set()

    def own_frozen(self) -> frozenset[str]:
        """Names within the section of weights that were written and are not trained."""
        return frozenset(self._own_frozen)

    @property
    def rounded_rows(self) -> str:
        return f"b {self.rounded}"

    def width(self, x: Tensor) -> int:
        axes = axes_of(x.shape)[1]
        width = 1
        for axis in axes[1:] if x.shape.startswith(f"{self.t} ") else axes:
            width *= int(axis)
        return width

    def attention_flops(self, window: int | None = None, is_masked: bool = False) -> tuple[tuple[int, int], ...]:
        """Every patch sees all of its image."""
        a = self.model.attention
        return ((BASIS.index("b"), 2 * self.images.count * self.tokens**2 * a.heads * (a.head_dim + a.v_head_dim)),)

    def weight(
        self,
        module: str,
        *shape: int,
        kinds: tuple[WeightKind, ...],
        name: str = ".weight",
        active: tuple[int, int] = (1, 1),
        dtype: str = "",
        is_adapter: bool = False,
    ) -> Weight:
        """Words for what a weight is beside its tower: that of a norm, a table."""
        own = self.names.get(module, module) + name
        named = Named(
            (self.section.prefix + own,),
            frozenset({WeightKind.NORMS, WeightKind.EMBEDDINGS} & {*kinds}) | {self.section.kind},
        )
        trained = not self.section.is_idle and named.names[0] not in self.images.frozen
        if not trained:
            self._own_frozen.add(own)
        self.images.named.append(named)
        return Weight(own, shape, active, named.kinds, trained, dtype=dtype)

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        """aten layer_norm_cuda and its backward take rows that lie in order (native/cuda/layer_norm_kernel.cu)."""
        y = super()._layer_norm(x, name)
        copy, op = self.tape.new(f"{name}'s input in order", x.shape, x.dtype), self.tape.ops[-1]
        back = (copy,) * (self.copies_rows + self.copies_gradients)
        self.tape.ops[-1] = replace(op, temps=op.temps + (copy,) * self.copies_rows, back_temps=op.back_temps + back)
        return y

    def positions(self, rows: int) -> Tensor:
        """What is learned of the places of patches (rows, d), the same for all images."""
        tape, width = self.tape, self.model.hidden
        table = self.weight("position_embedding", rows, width, kinds=(WeightKind.EMBEDDINGS,))
        temps = tuple(
            tape.new("sums of equal places", str(numbers), "float32" if size == 4 else "int64")
            for numbers, size in SortedLookups(rows, width).tensors(rows)
        )
        return tape.op(
            "embed places of patches",
            [],
            tape.new("places of patches", f"{rows} {width}", self.numerics.weights),
            weights=(table,),
            for_gradients=ForGradients(back_temps=tuple((temp, table) for temp in temps)),
        )


def _numerics(text: Numerics) -> Numerics:
    """Of a tower: peft's adapters are in the text part, images are no samples in a row."""
    return text._replace(adapters=None, masked=False, samples=1, padded=False, several_rows=False)


def sizes_of(encoder: Encoder) -> Model:
    """An encoder as a model of text of its sizes."""
    heads, e = encoder.heads, encoder.head_dim
    return Model(
        "vision tower",
        "",
        encoder.hidden,
        0,
        None,
        (),
        Attention(heads, heads, e, e, 0, qkv_bias=True, out_bias=True),
        Mlp(encoder.width, encoder.activation, gated=False, bias=True),
        norm="layer",
        norm_bias=True,
    )
