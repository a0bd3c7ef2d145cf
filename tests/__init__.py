"""Tests of flowjobs; they mirror its folders."""
