# ImageNet with the recipe of Table 3 (section 5.1): 120 epochs, batch 256, SGD with momentum 0.9
# and weight decay 1e-4, cosine learning rate from 0.1, color jitter.
_base_ = './in1k_120e_simple.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    # The paper names no strengths; these are the usual ones.
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
