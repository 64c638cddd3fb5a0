from calicache.export.export import export_onnx as export_onnx
from calicache.export.session.session import Session as Session
from calicache.graph_passes.api.optimize import optimize as optimize
from calicache.graph_passes.api.plan import Plan as Plan
from calicache.graph_passes.api.runtime import OptimizedModel as OptimizedModel
from calicache.graph_passes.api.speed.speed_up import speed_up as speed_up
from calicache.graph_passes.api.speed.subject import restore as restore
from calicache.graph_passes.common.errors import CalicacheError as CalicacheError
from calicache.graph_passes.recording.recorder import record as record
from calicache.graph_passes.recording.recording import Recording as Recording
from calicache.graph_passes.settings.choices import SiteMode as SiteMode
from calicache.graph_passes.settings.choices import SiteRule as SiteRule
from calicache.graph_passes.settings.choices import StepMode as StepMode
from calicache.graph_passes.settings.front import Front as Front
from calicache.graph_passes.settings.latency import LatencyTable as LatencyTable

__version__: str
