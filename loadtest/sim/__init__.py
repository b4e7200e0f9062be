"""A discrete-event simulator: the engine's own core on a modelled device, with time that costs nothing."""
