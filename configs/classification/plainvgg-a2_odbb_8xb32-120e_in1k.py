# ODBB(A2) (Table 4): RepNAS searches the branches of the stack.
_base_ = ['./plainvgg-a2_8xb32-120e_in1k.py', '../_base_/methods/odbb.py']

default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), warmup=12, fixed=80))
