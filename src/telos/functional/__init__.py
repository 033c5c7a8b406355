"""Pure tensor functions shared by methods. Nothing here knows a model, a loop or a task."""
