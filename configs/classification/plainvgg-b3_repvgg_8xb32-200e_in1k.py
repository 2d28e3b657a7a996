_base_ = ['./plainvgg-b3_8xb32-200e_in1k.py', '../_base_/methods/repvgg.py']

default_hooks = dict(dyrep=_base_.pop('dyrep'))
