# ODBB(B3) (Table 4): RepNAS searches the branches of the stack.
_base_ = ['./plainvgg-b3_8xb32-200e_in1k.py', '../_base_/methods/odbb.py']

default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), warmup=20, fixed=133))
