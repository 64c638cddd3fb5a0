"""Plan, optimize and OptimizedModel: what users call."""
