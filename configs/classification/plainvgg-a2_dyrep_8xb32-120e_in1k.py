# DyRep-A2 (Table 4). Here it grows from the plain stack; in the authors' files the 1x1 and identity
# branches of RepVGG are in place besides and never go. Nearest to that is structure='repvgg' beside
# these options, whose branches may be pruned.
_base_ = ['./plainvgg-a2_8xb32-120e_in1k.py', '../_base_/methods/dyrep.py']

# The last epoch that may grow, of 120: from the authors' files.
default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), end=100))
