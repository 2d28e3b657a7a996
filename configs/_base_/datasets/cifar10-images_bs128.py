# CIFAR-10 as image files, one folder a class: DATA/train/CLASS/*.jpg, DATA/test/CLASS/*.jpg, with
# DATA from the environment variable CIFAR10. Images stay in memory, since a small network trains
# faster than they are read.
dataset_type = 'dyrep_mm.ImagesInMemory'
data_root = '{{$CIFAR10:data/cifar10}}'
data_preprocessor = dict(
    num_classes=10,
    mean=[125.307, 122.961, 113.8575],
    std=[51.5865, 50.847, 51.255],
    to_rgb=True,  # files are read in BGR
)
loader = dict(batch_size=128, num_workers=0, collate_fn=dict(type='dyrep_mm.as_it_is'))
source = dict(type='CustomDataset', data_root=data_root, pipeline=[dict(type='LoadImageFromFile')])
train_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type, dataset=dict(source, data_prefix='train'), padding=4, flip=True
    ),
)
val_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, dataset=dict(source, data_prefix='test'), test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
del loader, source
