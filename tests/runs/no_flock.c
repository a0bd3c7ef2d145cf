/* A file system that knows no locks, for the programs that load this: flock fails as it does there. */
#include <errno.h>
#include <stdlib.h>

int flock(int descriptor, int operation) {
    const char *number = getenv("TEST_FLOCK_ERRNO");
    errno = number ? atoi(number) : ENOSYS;
    return -1;
}
