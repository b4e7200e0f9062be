"""What crosses the worker's boundary: requests, outputs, reports, errors, config, wire, cost model.

Standard library only: routers, the controller and the simulator import this and nothing below it.
"""
