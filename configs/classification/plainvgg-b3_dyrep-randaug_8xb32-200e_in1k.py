_base_ = ['./plainvgg-b3_dyrep_8xb32-200e_in1k.py', '../_base_/datasets/randaug.py']

# The augmentation of the authors' files; the paper has AutoAugment (section 5.1).
train_dataloader = dict(dataset=dict(pipeline=_base_.pop('randaug')))
