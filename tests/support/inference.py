"""Predictions of the libraries' own inference APIs, where dyrep_mm cannot be imported:
``python -m support.inference LIBRARY CONFIG OUT IMAGES... -- CHECKPOINTS...``.

``OUT`` holds, by name of the checkpoint, a list of tensors by name, one for each image.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def predict(library: str, config: str, checkpoint: str, images: list[str]) -> list[dict[str, Any]]:
    """The predictions for each image."""
    if library == 'mmdet':
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(config, checkpoint, device='cpu', palette='random')
        return [
            {name: torch.tensor(found[name]) for name in ('bboxes', 'scores', 'labels')}
            for found in inferencer(images, show=False, no_save_pred=True)['predictions']
        ]
    if library == 'mmseg':
        from mmseg.apis import MMSegInferencer

        inferencer = MMSegInferencer(config, checkpoint, device='cpu')
        samples = [inferencer(image, return_datasamples=True) for image in images]
        return [{'logits': sample.seg_logits.data} for sample in samples]
    from mmpretrain import ImageClassificationInferencer

    inferencer = ImageClassificationInferencer(config, checkpoint, device='cpu')
    return [
        {'scores': torch.tensor(found['pred_scores'])} for found in inferencer(images, show=False)
    ]


def main() -> None:
    sys.modules['dyrep_mm'] = None  # type: ignore[assignment]
    library, config, out, *rest = sys.argv[1:]
    middle = rest.index('--')
    images, checkpoints = rest[:middle], rest[middle + 1 :]
    found: dict[str, list[dict[str, Tensor]]] = {
        Path(checkpoint).name: predict(library, config, checkpoint, images)
        for checkpoint in checkpoints
    }
    assert 'dyrep_mm.registry' not in sys.modules
    torch.save(found, out)


if __name__ == '__main__':
    main()
