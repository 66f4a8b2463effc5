"""The images of a split one by one, without episodes, as torchvision's datasets give theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import VisionDataset

from mamldata.bank.format import Bank, Images
from mamldata.sampling.sampler import ClassTable


class BankImages(VisionDataset):
    """What ``mamldata.images`` returns: ``dataset[i]`` is an image and the index of its class.

    The images are those of the bank, mapped from its file, in the order of the classes; each process maps it itself.

    Args:
        bank: the images.
        table: the classes of the split.
        split: its name, for ``repr``.
        transform, target_transform: of the PIL image (``L`` or ``RGB``), and of the class's index.

    Attributes:
        classes: the name of each class; a turned one is called ``Greek/character03, turned 90``.
        class_to_idx: the index of each class by its name.
        targets: the index of the class of each image.
    """

    def __init__(
        self,
        bank: Bank,
        table: ClassTable,
        split: str,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(str(bank.path.parent), transform=transform, target_transform=target_transform)
        self.classes = [table.label(index) for index in range(len(table))]
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        targets = np.repeat(np.arange(len(table)), table.images)
        self.targets: list[int] = targets.tolist()
        starts = np.cumsum(table.images) - table.images
        self._rows = table.first_row[targets] + np.arange(len(targets)) - starts[targets]
        self._turns = table.quarter_turns
        self._bank, self._split = bank, split
        self._images: Images | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """An image and the index of its class, after their transforms.

        Raises:
            IndexError: there is no such image.
        """
        if self._images is None:
            self._images = self._bank.open_images()
        target: Any = self.targets[index]
        pixels = self._images[self._rows[index]]
        if turns := self._turns[target]:
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        image: Any = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def extra_repr(self) -> str:
        """The lines that torchvision adds to ``repr``."""
        return f"Dataset: {self._bank.name}, split {self._split}, {len(self.classes)} classes"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}
