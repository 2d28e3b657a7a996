# CIFAR-10 as image files, enlarged to 64x64 for networks with the stem of ImageNet.
_base_ = './cifar10-images_bs128.py'

enlarged = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64))]
train_dataloader = dict(batch_size=256, dataset=dict(padding=8, dataset=dict(pipeline=enlarged)))
val_dataloader = dict(batch_size=256, dataset=dict(dataset=dict(pipeline=enlarged)))
test_dataloader = val_dataloader
del enlarged
