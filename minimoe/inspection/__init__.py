"""What the routers of a model do, recorded and measured."""

from minimoe.inspection.trace import RoutingTrace, record_routing

__all__ = ["RoutingTrace", "record_routing"]
