# CIFAR-10 in the batches of Table 2 (section 5.1). From the authors' files: a square of 16 pixels
# is cut out of every image; it has the mean of the data, which is 0 for the model.
_base_ = 'mmpretrain::_base_/datasets/cifar10_bs16.py'

train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='Cutout', shape=16, pad_val=(125, 123, 114), prob=1.0),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=128, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
