"""The paper's claim, tested on the synthetic world: tasks that are trained together help each other."""
