# ODBB: the blocks that RepNAS finds (Table 4), with the numbers of its public code: a third of all
# branches, an Adam of its own for the architecture parameters. dyrep.py beside this file says how a
# config takes it; a config adds how long the phases are. In the public code they are 15 epochs of
# warm-up, 35 of search, and 100 with the path fixed; configs keep these parts of their schedules.
dyrep = dict(type='dyrep_mm.RepNASHook', keep=0.34)
