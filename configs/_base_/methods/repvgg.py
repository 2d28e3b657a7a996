# RepVGG's 3 operations (Table 1): every 3x3 conv of the backbone is expanded before the
# first iteration and never changes. Trained from scratch, so a branch starts as important as its
# conv. dyrep.py beside this file says how a config takes it.
dyrep = dict(type='dyrep_mm.DyRepHook', interval=None, structure='repvgg', init_scale=1.0)
