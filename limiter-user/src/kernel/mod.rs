//! Load, attach, pin; the maps as typed methods.
